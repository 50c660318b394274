"""The other ways to run a converted model: as its own teacher, layer-local transfer, gated selection."""

import pytest
import torch
from helpers import tiny_model
from linearize.students import PRESETS, chunked, full, left_padded, student_of, tokens
from tolerances import FAMILY, assert_near, error

import subquad
from subquad import UserError
from subquad.linearize.modes import as_teacher, calibrate, gated, transfer
from subquad.linearize.params import mixer_parameters

SPLIT = {0: [1], 2: [0]}  # layer 1 is converted whole
ARGUMENTS = dict(window=4, sinks=2, exact=SPLIT)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model()


@pytest.fixture(scope="module", params=PRESETS)
def student(request, teacher):
    return student_of(teacher, mixer=request.param, **ARGUMENTS)


IDS = tokens(2, 16)


def test_as_teacher_is_the_teacher_exactly(student, teacher):
    own = full(student, IDS)
    with as_teacher(student):
        assert torch.equal(full(student, IDS), full(teacher, IDS))
        assert torch.equal(chunked(student, IDS, [9, 15, 16])[0], chunked(teacher, IDS, [9, 15, 16])[0])
        prompt = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(student.generate(IDS, **prompt), teacher.generate(IDS, **prompt))
    assert torch.equal(full(student, IDS), own)
    assert error(own, full(teacher, IDS)) > 100 * FAMILY


def test_mode_ends_with_an_error(student):
    own = full(student, IDS)
    with pytest.raises(KeyError), as_teacher(student):
        raise KeyError
    assert torch.equal(full(student, IDS), own)


def heard(student, ids, **kwargs):
    """{layer: (mixed, exact, padding)} and logits of a transfer pass."""
    layers = {}
    with torch.no_grad(), transfer(student, lambda i, *x: layers.__setitem__(i, x)):
        logits = student(input_ids=ids, use_cache=False, **kwargs).logits
    return layers, logits


def test_transfer_passes_the_exact_output_on(student, teacher):
    layers, logits = heard(student, IDS)
    assert torch.equal(logits, full(teacher, IDS))
    assert {i: tuple(mixed.shape) for i, (mixed, *_) in layers.items()} == {0: (2, 16, 2, 16), 1: (2, 16, 4, 16), 2: (2, 16, 2, 16)}
    assert all(mixed.shape == exact.shape and padding is None for mixed, exact, padding in layers.values())


def test_transfer_compares_what_the_layer_would_do(student, teacher):
    """In layer 1 every head is converted: its output projection of `mixed` is what the student's layer gives on the teacher's input."""
    layers, _ = heard(student, IDS)
    module, inputs = student.model.layers[1].self_attn, {}
    handle = module.register_forward_pre_hook(lambda m, a, k: inputs.update(k), with_kwargs=True)
    heard(student, IDS)  # notes the teacher's input of the layer
    handle.remove()
    with torch.no_grad():
        mixed, exact, _ = layers[1]
        assert_near(module(**inputs)[0], module.o_proj(mixed.flatten(2)), FAMILY)
        assert_near(teacher.model.layers[1].self_attn(**inputs)[0], module.o_proj(exact.flatten(2)), FAMILY)


def test_transfer_gives_gradients_to_mixers_only(student):
    layers, _ = heard(student, IDS)
    parameters = mixer_parameters(student)
    for index, (mixed, exact, _) in layers.items():
        assert not exact.requires_grad
        assert mixed.requires_grad == bool(parameters), index
    if parameters:
        sum(mixed.square().sum() for mixed, *_ in layers.values()).backward()
        touched = {name for name, p in student.named_parameters() if p.grad is not None}
        assert touched == set(parameters)
        student.zero_grad()


def test_transfer_says_which_tokens_are_padding(student):
    ids, mask = left_padded(IDS, (16, 9), 16)
    layers, _ = heard(student, ids, attention_mask=mask)
    for mixed, _, padding in layers.values():
        assert torch.equal(padding, mask.bool()) and mixed.isfinite().all() and not mixed[1, :7].any()


def gates_of(student, value: float) -> dict:
    return {layer.index: torch.full((layer.kv_heads,), value) for layer in student.subquad_plan.converted}


def test_gates_go_from_window_to_teacher(student, teacher):
    window = subquad.linearize(tiny_model(), subquad.plan(teacher, window=4, sinks=2))
    for value, wanted in ((1.0, full(teacher, IDS)), (0.0, full(window, IDS))):
        with gated(student, gates_of(student, value)):
            assert_near(full(student, IDS), wanted, FAMILY, f"gates {value}")


def test_gates_are_per_head_and_get_gradients(student):
    gates = {i: g.requires_grad_() for i, g in gates_of(student, 0.5).items()}
    with gated(student, gates):
        student(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert all(g.grad.shape == (2,) and g.grad.abs().min() > 0 for g in gates.values())
        student.zero_grad()
    # One head open: as a plan that keeps exactly this head exact.
    with gated(student, {i: torch.tensor([float(i == 1), 0.0]) for i in gates}):
        found = full(student, IDS)
    teacher = tiny_model()
    assert_near(found, full(subquad.linearize(teacher, subquad.plan(teacher, window=4, sinks=2, exact={1: [0]})), IDS), FAMILY)


def test_modes_need_a_converted_model(teacher):
    with pytest.raises(UserError, match="no converted layers"), as_teacher(teacher):
        pass


def shares(student) -> dict:
    """layer -> [B, T', G, R] of ln(linear / softmax mass) at the tokens that have older ones, by the plain sums of definition.py."""
    from subquad.linearize.mixers.definition import near, scores_of, weights_of

    calls = {}
    hooks = [
        module.mixer.register_forward_pre_hook(lambda m, inputs, i=i: calls.__setitem__(i, (m, inputs[0])))
        for i, module in enumerate(layer.self_attn for layer in student.model.layers)
    ]
    with torch.no_grad():
        heard(student, IDS)
        found = {}
        for i, (mixer, call) in calls.items():
            T = call.q_BTGRK.shape[1]
            older = torch.ones(T, T).tril().bool() & ~near(mixer, T)
            linear = weights_of(mixer, call, older).sum(-1) * mixer.mix(call.hidden_BTD).exp().permute(0, 2, 3, 1)
            found[i] = (linear.log() - (scores_of(call).exp() * near(mixer, T)).sum(-1).log())[..., older.any(1)]
    for hook in hooks:
        hook.remove()
    return found


def test_calibrate_gives_the_linear_branch_a_tenth(teacher):
    """Where it is not fitted to the teacher's output (test_calibration.py)."""
    plain = {"fit_share": False, "fit_map": False}
    student = subquad.linearize(tiny_model(), subquad.plan(teacher, mixer="window_linear", options=plain, **ARGUMENTS))
    for i, ratio in shares(student).items():
        assert ratio.exp().mean() < 0.02, f"layer {i}: the plain start is far below"
    calibrate(student, IDS)
    for i, ratio in shares(student).items():
        assert_near(ratio.mean((0, 3)).sigmoid(), torch.full(ratio.shape[1:3], 0.1), 1e-3, f"layer {i}")
    with torch.no_grad():
        student.model.layers[0].self_attn.mixer.mix.weight[0, 0] = 1.0  # a gate that has been trained
        student.model.layers[0].self_attn.mixer.mix.bias.zero_()
    calibrate(student, tokens(2, 16, seed=1))
    assert not student.model.layers[0].self_attn.mixer.mix.bias.any()


def test_calibrate_leaves_other_mixers_alone(student):
    before = {name: p.clone() for name, p in student.named_parameters()}
    calibrate(student, IDS)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_mixers_compute_in_fp32_under_autocast(student, teacher):
    """Autocast would run the products with the recurrent state in bf16."""
    seen = []
    hooks = [
        layer.self_attn.mixer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        for layer in student.model.layers
    ]
    plain, teachers = full(student, IDS), full(teacher, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < error(full(student, IDS), plain) < 4 * error(full(teacher, IDS), teachers)
    assert seen == [False] * 6
    for hook in hooks:
        hook.remove()
