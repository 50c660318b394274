"""Start values from the teacher's layer (mixers/calibration.py): each gets its own objective down, depends on nothing but the text, and stays when trained.

Key: as in base.py; J tokens that are read.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from linearize.students import full, left_padded, tokens
from tolerances import MIXER, SAME_NUMBERS, assert_near, error

import subquad
from subquad.distill.data import Tokens
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.healing import heal
from subquad.linearize import hub
from subquad.linearize.mixers import build, calibration
from subquad.linearize.mixers.base import AttentionCall, HeadShape
from subquad.linearize.mixers.decays import DECAYS
from subquad.linearize.modes import calibrate
from subquad.progress import Reporter

B, T, D, G, R, K, V = 2, 96, 24, 2, 3, 8, 6
SHAPE, W, N = HeadShape(D, G, R, K, V), 8, 2
NONE = dict(fit_share=False, fit_map=False, fit_concentration=False, fit_decay=False)


def call_of(real: tuple[int, ...] = (), seed: int = 0) -> AttentionCall:
    """A head with scores of some spread; real: tokens of each row, filler behind them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, x = (torch.randn(B, T, *s, generator=generator) for s in ((G, R, K), (G, K), (G, V), (D,)))
    call = AttentionCall(1.5 * q, 1.5 * k + 0.5, v, x, K**-0.5, fewest=min(real, default=T), plain_q_BTGRK=q, plain_k_BTGK=k)
    call.real_BT = torch.arange(T) < torch.tensor(real)[:, None] if real else None
    weights = calibration.teacher_weights(call, torch.arange(T))
    return replace(call, exact_BTGRV=torch.einsum("btgrj,bjgv->btgrv", weights, v))


def built(name: str, **options):
    torch.manual_seed(0)
    return build(name, SHAPE, W, N, options)


def fitted(name: str, call: AttentionCall, **options):
    mixer = built(name, **options)
    with torch.no_grad():
        mixer(replace(call, calibrating=True))
    return mixer


def numbers(mixer) -> dict:
    return {name: x.clone() for name, x in mixer.state_dict().items()}


def left(mixer, call: AttentionCall) -> float:
    """Squared error of the output, relative to the teacher's."""
    with torch.no_grad():
        return float((mixer(call) - call.exact_BTGRV).square().sum() / call.exact_BTGRV.square().sum())


# preset, the switch, further options: everything that a start value is set for
CASES = {
    "gated": ("linear", "fit_share", {}),
    "added": ("lizard", "fit_share", {}),
    "norm": ("retnet", "fit_share", {}),
    "norm and gate": ("mamba2", "fit_share", {}),
    "scaled": ("linear", "fit_share", {"output": "scaled"}),
    "output gate": ("rala", "fit_share", {}),
    "corrects": ("gated_delta", "fit_share", {}),
    "slots": ("gsa", "fit_share", {}),
    "cache": ("gla", "fit_share", {"cache": 5}),
    "joint": ("window_linear", "fit_share", {}),
    "joint polynomial": ("rehyat", "fit_share", {}),
    "hedgehog": ("hedgehog_softmax2", "fit_map", {}),
    "hedgehog exp": ("hedgehog_exp", "fit_map", {}),
    "hedgehog added": ("lizard", "fit_map", {}),
    "hedgehog joint": ("window_linear", "fit_map", {"fit_share": True}),
    "log normal": ("lln", "fit_map", {}),
    "codebook": ("transformer_vq", "fit_map", {}),
    "entropy": ("hedgehog_softmax2", "fit_concentration", {}),
    "moments": ("lln", "fit_concentration", {}),
    "decay": ("gla", "fit_decay", {}),
    "fixed decay": ("retnet", "fit_decay", {}),
    "step size": ("mamba2", "fit_decay", {}),
}
every = pytest.mark.parametrize("case", CASES)


def made(case: str, call: AttentionCall, on: bool = True):
    name, switch, options = CASES[case]
    return fitted(name, call, **{**NONE, **options, switch: on})


@every
def test_the_switch_changes_something_and_no_nan(case):
    call = call_of()
    found, plain = numbers(made(case, call)), numbers(made(case, call, on=False))
    assert any(not torch.equal(x, plain[name]) for name, x in found.items())
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("case", [case for case, (_, switch, _) in CASES.items() if switch in ("fit_share", "fit_map")])
def test_the_output_comes_nearer_to_the_teachers(case):
    """On the text it was fitted to. The map's own objective is the best mix of its output, so the share is fitted on both sides of that."""
    call, options = call_of(), {}
    if CASES[case][1] == "fit_map" and case != "codebook":
        options = {"fit_share": True}
    name, switch, more = CASES[case]
    on, off = (left(fitted(name, call, **{**NONE, **more, **options, switch: value}), call) for value in (True, False))
    assert on < off, (on, off)


@every
def test_the_same_text_gives_the_same_numbers(case):
    assert_equal(numbers(made(case, call_of())), numbers(made(case, call_of())))


@every
def test_a_second_time_changes_nothing(case):
    mixer, call = made(case, call_of()), call_of()
    before = numbers(mixer)
    with torch.no_grad():
        mixer(replace(call, calibrating=True))
    for name, x in mixer.state_dict().items():
        assert_near(x, before[name], MIXER, name)


@pytest.mark.parametrize("case", [case for case, (name, *_) in CASES.items() if name != "transformer_vq"])
def test_trained_gates_are_left_alone(case):
    mixer = built(CASES[case][0], **{**NONE, **CASES[case][2], CASES[case][1]: True})
    with torch.no_grad():
        mixer.mix.weight[0, 0] = 0.1
        before = numbers(mixer)
        mixer(replace(call_of(), calibrating=True))
    assert_equal(numbers(mixer), before)


def test_trained_codewords_are_left_alone():
    mixer = built("transformer_vq")
    with torch.no_grad():
        mixer.map_k.codewords[0, 0, 0] += 0.1
        before = numbers(mixer)
        mixer(replace(call_of(), calibrating=True))
    assert_equal(numbers(mixer), before)


@every
def test_filler_counts_for_nothing(case):
    """Two rows of different length; what stands behind the real tokens changes no number."""
    call = call_of((T, 40))
    other = call_of((T, 40), seed=1)
    mixed = {}
    for name in ("q_BTGRK", "k_BTGK", "v_BTGV", "hidden_BTD", "exact_BTGRV", "plain_q_BTGRK", "plain_k_BTGK"):
        x = getattr(call, name)
        mixed[name] = torch.where(call.real_BT.view(B, T, *(1,) * (x.dim() - 2)), x, getattr(other, name))
    assert_equal(numbers(made(case, replace(call, **mixed))), numbers(made(case, call)))


@every
@pytest.mark.parametrize("real", [(T, 0), (0, 0), (W, W)], ids=str)
def test_rows_with_nothing_older(case, real):
    found = numbers(made(case, call_of(real)))
    assert all(x.isfinite().all() for x in found.values())
    if max(real) <= W and CASES[case][1] != "fit_map":
        assert_equal(found, numbers(built(CASES[case][0], **CASES[case][2])))


def assert_equal(found: dict, wanted: dict) -> None:
    assert [name for name, x in wanted.items() if not torch.equal(found[name], x)] == []


# --- objectives of their own -------------------------------------------------------------------------------------------------------------------


def test_mix_is_the_least_squares_mix():
    """Against a solver: no pair of numbers does better, and the error it states is the one that is left."""
    generator = torch.Generator().manual_seed(0)
    window, linear, noise = (torch.randn(50, G, R, V, generator=generator) for _ in range(3))
    exact = 0.7 * window + 0.6 * linear + 0.3 * noise
    for adds, sized in ((False, False), (False, True), (True, False)):
        found = calibration.mix_of(window, linear, exact, adds, sized)
        for g in range(G):
            for r in range(R):
                w, l, e = (x[:, g, r].flatten().double() for x in (window, linear, exact))
                a, b = (w, l) if sized else (l, None) if adds else (l - w, None)
                columns, target = torch.stack([a] if b is None else [a, b], 1), e if sized else e - w
                solved = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution.flatten()
                share = float(found.share_GR[g, r])
                mine = [1 - share, share * float(found.size_GR[g, r])] if sized else [share]
                assert_near(torch.tensor(mine), solved.float(), MIXER, f"{adds}, {sized}")
                assert_near(found.error_GR[g, r], (columns @ solved - target).square().sum().float(), MIXER)


def test_a_useless_branch_keeps_a_small_share():
    window, linear = (torch.randn(50, G, R, V, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = calibration.mix_of(window, linear, window - linear, sized=True)
    assert (found.share_GR >= calibration.LEAST).all() and (found.size_GR > 0).all()


def sample_of(mixer, call, log_weights_GJ) -> calibration.Sample:
    """A teacher whose weights of older tokens depend on their age only."""
    sample = calibration.look(mixer, call)
    weights = log_weights_GJ(sample.age_QJ.clamp_min(0).float()).exp() * sample.older_BQJ[:, :, None, None]
    return replace(sample, weights_BQGRJ=weights / weights.sum(-1, keepdim=True).clamp_min(1e-30))


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
def test_decay_finds_the_teachers_rate(rate):
    mixer, call = built("gla"), call_of()
    rates = torch.tensor([rate, 2 * rate])
    sample = sample_of(mixer, call, lambda age: (-rates[:, None, None] * age[:, None, None]).expand(B, -1, -1, R, -1))
    assert_near(calibration.fade(sample), -rates, 0.1)  # a step of the grid is 21 %


def test_decay_of_even_attention_is_the_slowest():
    mixer, call = built("gla"), call_of()
    sample = sample_of(mixer, call, lambda age: torch.zeros(B, age.shape[0], G, R, T))
    assert_near(calibration.fade(sample), torch.full((G,), -1e-4), 1e-6)


@pytest.mark.parametrize("name", [name for name, row in DECAYS.items() if row.fits])
def test_every_decay_starts_where_it_is_told(name):
    decay, log_G = DECAYS[name].module(SHAPE, 4, 2), torch.tensor([-0.002, -0.2])
    with torch.no_grad():
        decay.start_at(log_G)
        found = decay(torch.randn(1, 3, D))
        assert_near(found, (log_G.view(1, 1, G, 1) if DECAYS[name].vector else log_G).expand_as(found), 1e-4, name)


def test_concentration_is_nearer_the_teachers():
    call = call_of()
    plain, mixer = made("entropy", call, on=False), made("entropy", call)
    sample = calibration.look(mixer, call)
    mass = sample.mass_BQGR
    wanted = calibration._entropy(sample.weights_BQGRJ * sample.older_BQJ[:, :, None, None], mass)
    with torch.no_grad():
        off, on = ((calibration._entropy(calibration.linear_weights(x, call, sample), mass) - wanted).abs() for x in (plain, mixer))
    assert (on < off).all(), (on, off)


def test_moments_match_the_variance():
    """a (alpha^2 var q + beta^2 var k) + b is the variance of the scores, for heads that do not share their keys."""
    call = call_of()
    one = replace(call, q_BTGRK=call.q_BTGRK[:, :, :, :1], exact_BTGRV=call.exact_BTGRV[:, :, :, :1])
    mixer = build("lln", HeadShape(D, G, 1, K, V), W, N, {**NONE, "fit_concentration": True})
    with torch.no_grad():
        mixer(replace(one, calibrating=True))
    logs = [x.transpose(0, 2).flatten(1).var(1, unbiased=False) for x in (mixer.map_q(one.q_BTGRK), mixer.map_k(one.k_BTGK))]
    given = [x.transpose(0, 2).flatten(1).var(1, unbiased=False) for x in (one.q_BTGRK, one.k_BTGK)]
    assert_near(calibration.MOMENT_A * (logs[0] + logs[1]) + calibration.MOMENT_B, given[0] * given[1], MIXER)


def test_codewords_come_nearer_to_the_keys():
    """Than keys taken from the text at even distances, where k-means starts."""
    call = call_of()
    keys = call.k_BTGK.flatten(0, 1).transpose(0, 1)

    def distance(words) -> float:
        return float(torch.cdist(keys, words.detach()).amin(-1).square().mean())

    words = made("codebook", call).map_k.codewords
    assert distance(words) < 0.8 * distance(keys[:, torch.linspace(0, B * T - 1, 64).round().long()])


# --- in a model --------------------------------------------------------------------------------------------------------------------------------

IDS = tokens(2, 40)
STUDENTS = ("window_linear", "gla", "lln", "transformer_vq", "mamba2", "retnet")


def student_of(name: str, **options):
    teacher = tiny_model()
    return subquad.linearize(teacher, subquad.plan(teacher, mixer=name, window=4, sinks=2, exact={0: [1]}, options=options))


@pytest.mark.parametrize("name", STUDENTS)
def test_left_padding_counts_for_nothing(name):
    """Rows of 40 and 25 tokens pushed to the right, against the same with the filler behind: rotary positions are counted from the first real token."""
    ids, mask = left_padded(IDS, (40, 25), 40)
    right = torch.zeros_like(ids), torch.zeros_like(mask)
    for i, n in enumerate((40, 25)):
        right[0][i, :n], right[1][i, :n] = IDS[i, :n], 1
    one, other = student_of(name), student_of(name)
    calibrate(one, ids, mask)
    calibrate(other, *right)
    for key, x in one.state_dict().items():
        assert_near(other.state_dict()[key], x, MIXER, key)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_saved_student_is_the_calibrated_one(name, tmp_path):
    student = student_of(name, fit_decay=True)
    plain = full(student, IDS)
    calibrate(student, IDS)
    assert error(full(student, IDS), plain) > 1e-3
    hub.save(student, tmp_path / "student", tiny_tokenizer(), provenance={})
    assert_near(full(hub.load(tmp_path / "student"), IDS), full(student, IDS), SAME_NUMBERS)


STAGE = dict(train="mixers", inputs="teacher", losses={"attention_output": 1.0}, context=40, lr=1e-2)


@pytest.mark.parametrize("name", STUDENTS)
def test_training_that_goes_on_ends_where_it_would_have(name, tmp_path):
    """Two stages in one go; then again on a fresh student, with the first stage read back. Buffers too: checkpoints do not hold them."""
    text = Tokens(np.random.default_rng(0).integers(5, 250, 400).astype(np.int32))
    stages = [Stage(name=stage, tokens=tokens, **STAGE) for stage, tokens in (("one", 80), ("two", 40))]
    ends = []
    for stop in (2, 1, 2):
        student = student_of(name, fit_decay=True)
        folder = tmp_path / ("whole" if not ends else "parts") / "checkpoints"
        heal(
            student, stages[:stop], text, open_teacher=lambda: None, folder=folder, log=JsonLog(tmp_path / "log"), seed=0, report=Reporter()
        )
        ends.append(student.state_dict())
    assert_equal(ends[2], ends[0])
