"""Every Triton kernel, forward and backward, in the corrected interpreter: against the definition in fp64, on NaN-filled buffers, with bounds and races checked.

Cases are small (the interpreter takes a tenth of a millisecond an operation) and chosen so that every branch of every kernel runs: tails, packed sequences
with an empty one, groups of query heads, K != V, sizes that are no power of two, initial and final states, strong decays, sinks inside and given.

Key: as in subquad/kernels/ops.py.
"""

import pytest
import torch
from kernels.test_ops import D64, compare, decay, limits_case, linear_case, mapped_case, randn, results, window_case
from tolerances import error

from subquad.kernels import ops
from subquad.kernels.features import FUSED
from subquad.kernels.triton import launch

#          T   K    V   G  R  decay            packed  state
LINEAR = {
    "one token": (1, 16, 16, 1, 2, "scalar", False, True),
    "plain, tail": (45, 16, 24, 1, 1, "none", False, True),
    "groups, packed": (40, 16, 16, 1, 3, "none", True, True),
    "scalar, groups, packed": (70, 16, 20, 1, 2, "scalar mixed", True, True),
    "scalar strong, no state": (33, 16, 16, 2, 1, "scalar strong", False, False),
}
VECTOR = {
    "vector, packed": (40, 16, 24, 1, 2, "vector mixed", True, True),
    "vector strong, size 20": (33, 20, 16, 1, 1, "vector strong", False, True),
}


def cases(table: dict):
    return [pytest.param(case, id=name) for name, case in table.items()]


def additive_leaves(case):
    leaves, other, g = linear_case(*case)
    return {**leaves, "log_decay": g}, other


def delta_leaves(case):
    leaves, other, g = linear_case(*case, unit=True)
    return {**leaves, "log_decay_BTG": g, "beta_BTG": torch.rand(*leaves["k_BTGK"].shape[:3], dtype=D64)}, other


@pytest.mark.parametrize("case", cases(LINEAR | VECTOR))
def test_additive(case):
    compare(ops.additive, *additive_leaves(case), "triton")


@pytest.mark.parametrize("case", cases(LINEAR))
def test_delta(case):
    compare(ops.delta, *delta_leaves(case), "triton")


def test_delta_with_repeated_keys_and_full_writes():
    leaves, other = delta_leaves((45, 16, 16, 1, 1, "scalar mixed", False, True))
    leaves["k_BTGK"] = leaves["k_BTGK"][:, torch.arange(45) % 3]
    leaves["beta_BTG"] = torch.full((2, 45, 1), 1 - 1e-4, dtype=D64)
    compare(ops.delta, leaves, other, "triton")


#          T   K   V  G  R  window sinks before position own packed  F   decay
WINDOWS = {
    "sinks, state": (50, 16, 24, 1, 2, 20, 3, 0, 0, False, False, 16, "none"),
    "scalar, packed": (45, 16, 16, 1, 2, 7, 2, 0, 0, False, True, 16, "scalar mixed"),
    "vector, continued, given sinks": (20, 16, 16, 1, 2, 10, 4, 12, 50, True, False, 20, "vector"),
    "continued": (36, 16, 16, 1, 1, 33, 2, 40, 40, False, False, 16, "scalar"),
    "window of one": (20, 8, 6, 1, 2, 1, 1, 0, 0, False, False, 16, "none"),
    "nothing leaves": (20, 16, 16, 1, 1, 40, 2, 0, 0, False, False, 16, "scalar"),
    "large values": (20, 16, 72, 1, 1, 5, 2, 0, 0, False, False, 16, "scalar"),
    "more sinks than window": (30, 16, 16, 1, 1, 3, 9, 0, 0, False, False, 16, "none"),
}


@pytest.mark.parametrize("case", cases({name: case for name, case in WINDOWS.items() if name not in ("scalar, packed", "nothing leaves")}))
def test_banded(case):
    leaves, other, _ = window_case(*case)
    compare(ops.banded, leaves | {"sink_logit_H": randn(leaves["q_BTHK"].shape[2])}, other, "triton")


def test_banded_packed():
    leaves, other, _ = window_case(*WINDOWS["scalar, packed"])
    for normalise in (False, True):
        compare(ops.banded, leaves, other | {"normalise": normalise}, "triton")


@pytest.mark.parametrize("case", cases(WINDOWS))
def test_window_linear(case):
    leaves, other, more = window_case(*case)
    compare(ops.window_linear, leaves | more, other | {"output_final_state": True}, "triton")


# T, K, V, G, R, decay, packed, state
SMALL = {
    "plain, groups": (20, 8, 16, 1, 2, "none", False, False),
    "scalar, packed": (40, 20, 24, 1, 2, "scalar mixed", True, True),
    "vector": (33, 16, 16, 1, 1, "vector", False, True),
}
MAPS_OF = {"plain, groups": FUSED, "scalar, packed": FUSED, "vector": ("hedgehog_softmax", "softmax")}


@pytest.mark.parametrize(("name", "feature_map"), [(name, m) for name, maps in MAPS_OF.items() for m in maps])
def test_feature_maps_inside(name, feature_map):
    one, five, other = mapped_case(SMALL[name], feature_map)
    compare(ops.additive, one, other, "triton")
    compare(ops.window_linear, five, other | {"window": 9, "sinks": 2}, "triton")


@pytest.fixture
def segmented(monkeypatch):
    """Sequences cut after 32 tokens, however short and many they are: the form for few heads."""
    for module in ("additive", "window"):
        monkeypatch.setattr(f"subquad.kernels.triton.{module}.SEGMENT_TOKENS", 32)
    monkeypatch.setattr(launch, "SEGMENTED_FROM", 1)


@pytest.mark.parametrize("kind", ("scalar", "vector"))
def test_additive_in_segments(segmented, kind):
    compare(ops.additive, *additive_leaves((70, 16, 16, 1, 2, kind, True, True)), "triton")


@pytest.mark.parametrize("kind", ("scalar", "vector"))
def test_window_linear_in_segments(segmented, kind):
    leaves, other, more = window_case(70, 16, 16, 1, 2, 10, 2, 0, 0, False, True, 16, kind)
    compare(ops.window_linear, leaves | more, other | {"output_final_state": True}, "triton")


@pytest.mark.parametrize("feature_map", ("hedgehog_exp", "hedgehog_softmax2"))
def test_feature_maps_in_segments(segmented, feature_map):
    one, five, other = mapped_case((70, 16, 16, 1, 2, "scalar", False, True), feature_map)
    compare(ops.additive, one, other, "triton")
    compare(ops.window_linear, five, other | {"window": 9, "sinks": 2}, "triton")


@pytest.mark.parametrize("feature_map", FUSED)
def test_features_at_the_limits(feature_map):
    one, five = limits_case(feature_map, 20)
    compare(ops.additive, one, {"feature_map": feature_map, "output_final_state": True}, "triton")
    compare(ops.window_linear, five, {"feature_map": feature_map, "output_final_state": True, "window": 5, "sinks": 1}, "triton")


# ---- precision: error of the largest result or gradient, relative to the largest number of that result or gradient -----------------------------------

BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3}  # a few roundings of 2^-9 and 2^-12; measured 6e-3 and 7e-4


@pytest.mark.parametrize("dtype", BOUND, ids=("bf16", "fp16"))
@pytest.mark.parametrize("op", ("additive", "delta", "banded", "window_linear"))
def test_low_precision(op, dtype):
    if op in ("additive", "delta"):
        leaves, other = (additive_leaves if op == "additive" else delta_leaves)((45, 16, 24, 1, 2, "scalar", False, True))
    else:
        leaves, other, more = window_case(*WINDOWS["sinks, state"])
        leaves, other = (leaves | more, other | {"output_final_state": True}) if op == "window_linear" else (leaves, other)
    rounded = {
        name: None if x is None else x.to(dtype) if "state" not in name and "decay" not in name else x.float() for name, x in leaves.items()
    }
    fn = getattr(ops, op)

    def low(**arguments):
        return fn(**{n: None if x is None else x.to(rounded[n].dtype) for n, x in arguments.items() if n in rounded},
                  **{n: x for n, x in arguments.items() if n not in rounded})  # fmt: skip

    found, slopes = results(low, rounded, other, torch.float32, "triton")
    wanted, wanted_slopes = results(
        fn, {n: None if x is None else x.detach().double() for n, x in rounded.items()}, other, D64, "definition"
    )
    for i, (x, want) in enumerate(zip(found, wanted, strict=True)):
        assert error(x, want) < BOUND[dtype], f"result {i}: {error(x, want):.1e}"
    for name, want in wanted_slopes.items():
        assert error(slopes[name], want) < BOUND[dtype], f"gradient of {name}: {error(slopes[name], want):.1e}"


def test_tf32_costs_what_it_should():
    """input_precision reaches every product: tf32 is wrong by some 1e-4, tf32x3 as good as fp32."""
    from subquad.kernels.triton import functions

    leaves, other = additive_leaves(LINEAR["plain, tail"])
    wanted, _ = ops.additive(**leaves, **other, backend="definition")
    given = {"qkv"[i]: x.float() for i, (name, x) in enumerate(leaves.items()) if i < 3}
    off = {
        p: error(
            functions.additive(*given.values(), initial_state=leaves["initial_state"].float(), scale=0.3, input_precision=p)[0], wanted
        )
        for p in ("ieee", "tf32x3", "tf32")
    }
    assert off["ieee"] < 1e-6 and off["tf32x3"] < 2e-6 and 5e-5 < off["tf32"] < 2e-3, off


# ---- one token -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("none", "scalar", "vector"))
@pytest.mark.parametrize("op", ("additive_step", "delta_step"))
def test_steps(op, kind):
    if op == "delta_step" and kind == "vector":
        return
    B, G, R, K, V = 2, 2, 3, 20, 40
    g = decay(kind, B, 1, G, K)
    state = randn(B, G, K, V)
    given = [randn(B, G * R, K), torch.nn.functional.normalize(randn(B, G, K), dim=-1), randn(B, G, V)]
    given += [torch.rand(B, G, dtype=D64)] if op == "delta_step" else []
    check_step(getattr(ops, op), given, state, [None if g is None else g[:, 0]], scale=0.3)


@pytest.mark.parametrize("kind", ("none", "scalar", "vector"))
def test_window_step(kind):
    B, G, R, K, V, F, W, N = 2, 1, 3, 20, 24, 32, 40, 3
    g = decay(kind, B, 1, G, F)
    given = [randn(B, G * R, K), randn(B, W, G, K), randn(B, W, G, V), torch.rand(B, G * R, F, dtype=D64), randn(B, G * R)]
    after = [torch.rand(B, G, F, dtype=D64), randn(B, G, V), None if g is None else g[:, 0]]
    sinks = {"sink_k_BNGK": randn(B, N, G, K), "sink_v_BNGV": randn(B, N, G, V)}
    check_step(ops.window_linear_step, given, torch.rand(B, G, F, V + 1, dtype=D64), after, **sinks)


def test_window_step_without_a_state():
    given = [randn(2, 2, 16), randn(2, 5, 1, 16), randn(2, 5, 1, 24)]
    wanted = ops.window_linear_step(*given, backend="definition")
    found = ops.window_linear_step(*(x.float() for x in given), backend="triton")
    assert error(found, wanted) < 2e-6


def check_step(fn, given, state, after, **keywords):
    mine = state.float()
    low = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    found = fn(*(x.float() for x in given), mine, *(None if x is None else x.float() for x in after), **low, backend="triton")
    wanted = fn(*given, state, *after, **keywords, backend="definition")
    assert error(found, wanted) < 2e-6 and error(mine, state) < 1e-6
