"""A student that is broken in a known way is caught; one that is not passes."""

from contextlib import contextmanager

import helpers
import pytest
import torch
from linearize.students import PRESETS

from subquad import ablation
from subquad.diagnosis import branches, checked, checks, diagnose, effective_map, teacher_logits
from subquad.errors import UserError
from subquad.evals.maps import entropy, map_kl, monotonicity
from subquad.evals.models import measuring
from subquad.linearize import linearize, plan
from subquad.linearize.seam import seams

TOKENS = torch.randint(257, (300,), generator=torch.Generator().manual_seed(2))
SMALL = {"context": 48, "windows": 1, "repeat": 24, "samples": 1, "layers": 1, "maps": 40, "steps": 6}


def student(mixer="gated_delta", exact=None):
    return linearize(helpers.tiny_model(), plan(helpers.tiny_model(), mixer=mixer, window=8, sinks=2, exact=exact))


def findings(model):
    return checks(model, TOKENS, SMALL) + branches(model, TOKENS, SMALL)[1]


@pytest.mark.parametrize("mixer", ["window", "gated_delta"])
def test_whole_student_passes(mixer):
    assert findings(student(mixer, exact={1: [0]})) == []


def dead_branch(model):
    """The gate that lets the linear branch in is shut."""
    for seam in seams(model):
        seam.module.mixer.mix.bias.data.fill_(-60.0)


def forgets(model):
    """The state is new in every call."""
    for seam in seams(model):

        def fresh(mixer, args):
            state = args[0].state
            if state is not None:
                for name in ("window_k", "window_v", "window_extra", "sink_k", "sink_v", "memory", "seen_B"):
                    setattr(state, name, None)
                state.fewest = 0

        seam.module.mixer.register_forward_pre_hook(fresh)


def wrong_groups(model):
    """Query head h reads key/value head h mod G instead of h // R."""
    for seam in seams(model):

        def regroup(mixer, args):
            q = args[0].q_BTGRK
            args[0].q_BTGRK = q.flatten(2, 3).unflatten(2, (q.shape[3], q.shape[2])).transpose(2, 3)

        seam.module.mixer.register_forward_pre_hook(regroup)


def short_window(model):
    """One token less than the plan says."""
    for seam in seams(model):
        seam.module.mixer.window -= 1


BROKEN = {
    "linear branch zeroed": (dead_branch, "linear branch does nothing"),
    "state reset every token": (forgets, "Token by token"),
    "wrong head grouping": (wrong_groups, "heads are grouped wrongly"),
    "off-by-one window": (short_window, "window is not the plan's"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_student_is_caught(what):
    model = student()
    damage, said = BROKEN[what]
    damage(model)
    assert any(said in finding for finding in findings(model)), findings(model)


def test_window_that_sees_one_token_too_many_is_caught(monkeypatch):
    """The mistake is in the window's own arithmetic, and the plan's numbers are right."""
    from subquad.linearize.mixers import local

    right = local.banded
    monkeypatch.setattr(local, "banded", lambda *args, window, **more: right(*args, window=window + 1, **more))
    assert any("the plan says" in finding for finding in checks(student("window"), TOKENS, SMALL))


def test_rows_say_what_parts_are_worth():
    result = diagnose(student(exact={1: [0]}), TOKENS, helpers.tiny_model(), SMALL)
    parts = {row["branch"]: row["ratio"] for row in result["rows"] if row["metric"] == "ablated_perplexity"}
    assert list(parts) == ["nothing taken away", "linear branch off", "window off", "sinks off", "exact heads off", "layer 0 restored"]
    assert parts["nothing taken away"] == 1 and all(ratio != 1 for name, ratio in parts.items() if name != "nothing taken away")
    heads = [(row["layer"], row["head"]) for row in result["rows"] if row["metric"] == "attention_kl"]
    assert heads == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 3),
    ]  # head 0 of layer 1 holds query heads 0, 1


def test_variants_leave_the_student_as_it_was():
    model = student(exact={1: [0]})
    with torch.no_grad():
        before = model(TOKENS[None, :40]).logits
        for opener in ablation.variants(model).values():
            with opener() as changed:
                assert not torch.equal(changed(TOKENS[None, :40]).logits, before)
        assert torch.equal(model(TOKENS[None, :40]).logits, before)


def test_everything_restored_is_the_teacher():
    model = student()
    names = [f"layer {index} restored" for index in range(3)]
    with torch.no_grad():
        from contextlib import ExitStack

        with ExitStack() as stack:
            for name in names:
                stack.enter_context(ablation.variants(model)[name]())
            restored = model(TOKENS[None, :40]).logits
        torch.testing.assert_close(restored, helpers.tiny_model()(TOKENS[None, :40]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixer", PRESETS)
def test_effective_map_gives_the_output_back(mixer):
    """Weights read off with one-hot values, times the real values, are the mixer's output."""
    from subquad.diagnosis import Capture

    model = student(mixer)

    @contextmanager
    def opened():
        yield model

    with measuring(opened), Capture(model) as seen:
        model(TOKENS[None, :40], use_cache=False)
        call, out = seen.calls[0], seen.outputs[0]
        weights = effective_map(seen.seams[0].module.mixer, call)
        if weights is None:
            pytest.skip(f"{mixer}: the output is no weighted sum of values")
        values = call.v_BTGV[0].repeat_interleave(2, dim=1)  # [S, P, V]
        again = torch.einsum("pts,spv->tpv", weights, values)
        torch.testing.assert_close(again, out[0].flatten(1, 2), atol=1e-4, rtol=1e-4)
        assert (teacher_logits(call).softmax(-1).sum(-1) - 1).abs().max() < 1e-5


def test_maps_against_plain_sums():
    uniform = torch.full((1, 3, 4), 0.25)
    spike = torch.zeros(1, 3, 4)
    spike[..., 2] = 1
    assert entropy(uniform).allclose(torch.tensor(4.0).log().double()) and entropy(spike).abs().max() < 1e-6
    assert map_kl(spike, uniform).allclose(torch.tensor(4.0).log().double()) and map_kl(spike, spike).abs().max() < 1e-6
    logits = torch.tensor([[[0.0] * 4, [1.0, 2.0, 0, 0], [3.0, 1.0, 2.0, 0], [4.0, 1.0, 3.0, 2.0]]])
    assert monotonicity(logits, logits.exp(), 1).allclose(torch.ones(1, 3).double())
    assert monotonicity(logits, -logits, 1).allclose(-torch.ones(1, 3).double())


def test_maps_reach_beyond_a_wide_window():
    """A window longer than the maps asked for must not make a linear branch look dead."""
    model = linearize(helpers.tiny_model(), plan(helpers.tiny_model(), mixer="gated_delta", window=60, sinks=2))
    assert diagnose(model, TOKENS, None, SMALL | {"layers": 0})["findings"] == []


def test_settings_are_checked():
    with pytest.raises(UserError, match="Did you mean 'windows'"):
        checked({"window": 3})
    with pytest.raises(UserError, match="no converted layers"):
        diagnose(helpers.tiny_model(), TOKENS, None, SMALL)
