"""Steps through the compiled functions that take tensors (cpu/python_source.py): the numbers of the definition, or left to the checked way.

Key: as in kernels/ops.py.
"""

import pytest
import torch
from tolerances import OP, assert_near

from subquad.errors import UserError
from subquad.kernels import dispatch, ops

B, G, R, W, N = 2, 2, 3, 21, 4


def linear(K, V, decay):
    """q, k, v, beta, state, log_decay, scale."""
    unit = torch.nn.functional.normalize(torch.randn(B, G, K), dim=-1)
    g = {"none": None, "scalar": -torch.rand(B, G), "vector": -torch.rand(B, G, K)}[decay]
    return [torch.randn(B, G * R, K), unit, torch.randn(B, G, V), torch.rand(B, G), torch.randn(B, G, K, V), g, 0.5]


def window(K, V, F, decay, sinks=N):
    """q, k, v, fq, mix, state, left_fk, left_v, log_decay, scale, sink_k, sink_v."""
    g = {"none": None, "scalar": -torch.rand(B, G), "vector": -torch.rand(B, G, F)}[decay]
    own = [torch.randn(B, sinks, G, K), torch.randn(B, sinks, G, V)] if sinks else [None, None]
    return [torch.randn(B, G * R, K), torch.randn(B, W, G, K), torch.randn(B, W, G, V), torch.rand(B, G * R, F), torch.randn(B, G * R),
            torch.rand(B, G, F, V + 1), torch.rand(B, G, F), torch.randn(B, G, V), g, None, *own]  # fmt: skip


def check(quick, op, given, state_at):
    """Against the definition in fp64 on the same numbers; the state too."""
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in given]
    if op == "window_linear_step":
        wanted = ops.window_linear_step(*wide[:9], sink_k_BNGK=wide[10], sink_v_BNGV=wide[11], backend="definition")
    else:
        args = wide[:3] + ([] if op == "additive_step" else [wide[3]]) + wide[4:6]
        wanted = getattr(ops, op)(*args, scale=wide[6], backend="definition")
        given = [*given[:3], None, *given[4:]] if op == "additive_step" else given
    found = quick[op](*given)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert_near(found, wanted, OP)
    if wide[state_at] is not None:
        assert_near(given[state_at], wide[state_at], OP)


SIZES = [(64, 64), (32, 128), (20, 17), (1, 1), (96, 80)]


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_linear_steps(quick, K, V, decay):
    torch.manual_seed(0)
    check(quick, "additive_step", linear(K, V, decay), 4)
    if decay != "vector":
        check(quick, "delta_step", linear(K, V, decay), 4)


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_window_steps(quick, K, V, decay):
    torch.manual_seed(0)
    for sinks in (0, 1, N):
        check(quick, "window_linear_step", window(K, V, K + 3, decay, sinks), 5)
    nothing_leaves = window(K, V, K, decay)
    nothing_leaves[6:8] = None, None
    check(quick, "window_linear_step", nothing_leaves, 5)
    no_state = window(K, V, K, decay)
    no_state[3:9] = [None] * 6
    check(quick, "window_linear_step", no_state, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_views(quick, dtype):
    """Mixed dtypes, slices of longer rows, tokens sliced out of sequences, parameters."""
    torch.manual_seed(0)
    low = [x.to(dtype) if i in (0, 1, 2, 3) else x for i, x in enumerate(linear(64, 48, "scalar"))]
    check(quick, "delta_step", low, 4)
    given = [x.to(dtype) if i in (0, 1, 2, 3, 6, 7, 10, 11) else x for i, x in enumerate(window(64, 48, 64, "scalar"))]
    given[1] = torch.cat([given[1], given[1]], 1)[:, 3 : W + 3]
    given[2] = torch.cat([given[2], given[2]], -1)[..., 5:53]
    given[7] = given[2][:, 0]
    given[0] = torch.nn.Parameter(given[0])
    given[4] = given[4].t().contiguous().t()
    check(quick, "window_linear_step", given, 5)


UNUSUAL = {
    "heads": lambda x: [x[0][:, :5], *x[1:]],
    "sizes": lambda x: [x[0], x[1][..., :32], *x[2:]],
    "batch": lambda x: [*x[:2], x[2][:1], *x[3:]],
    "dimensions": lambda x: [x[0][0], *x[1:]],
    "fp64": lambda x: [x[0].double(), *x[1:]],
    "whole numbers": lambda x: [x[0].int(), *x[1:]],
    "another device": lambda x: [x[0].to("meta"), *x[1:]],
    "strided rows": lambda x: [x[0], x[1], x[2].transpose(1, 2).contiguous().transpose(1, 2), *x[3:]],
    "state in bf16": lambda x: [*x[:4], x[4].bfloat16(), *x[5:]],
    "state transposed": lambda x: [*x[:4], x[4].transpose(2, 3), *x[5:]],
    "state missing": lambda x: [*x[:4], None, *x[5:]],
    "no tensor": lambda x: [1.0, *x[1:]],
    "subclass": lambda x: [x[0].as_subclass(type("Own", (torch.Tensor,), {})), *x[1:]],
    "empty": lambda x: [x[0][:0], x[1][:0], x[2][:0], x[3][:0], x[4][:0], x[5][:0], x[6]],
    "scale": lambda x: [*x[:6], "one"],
    "too few": lambda x: x[:6],
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_calls_are_left_alone(quick, what):
    given = linear(64, 64, "scalar")
    state = given[4].clone()
    assert quick["delta_step"](*UNUSUAL[what](given)) is None
    assert torch.equal(given[4], state)


def test_auto_takes_them_from_the_second_call_and_errors_stay_friendly(quick, monkeypatch):
    monkeypatch.setattr(dispatch, "_quick", {})
    monkeypatch.setattr(dispatch, "_said", set())
    q, k, v, _, state, g, _ = linear(64, 64, "scalar")
    first = ops.additive_step(q, k, v, state.clone(), g)
    assert dispatch._quick["additive_step"] is not None
    dispatch._quick["additive_step"] = lambda *x, own=quick["additive_step"]: own(*x)
    assert torch.equal(ops.additive_step(q, k, v, state.clone(), g), first)
    with pytest.raises(UserError, match="state has shape"):
        ops.additive_step(q, k, v, state[:, :1], g)
    transposed = state.transpose(2, 3).contiguous().transpose(2, 3)
    assert_near(ops.additive_step(q, k, v, transposed, g), first, OP)  # the checked way


def test_other_instruction_sets(other_isa, quick):
    check(quick, "delta_step", linear(64, 64, "scalar"), 4)
    check(quick, "additive_step", linear(20, 17, "vector"), 4)
    check(quick, "window_linear_step", window(20, 33, 12, "scalar"), 5)
