"""The linear ops through compiled functions that take tensors (cpu/python_source.py): the same numbers as the checked way, or left to it.

Key: as in kernels/ops.py.
"""

import pytest
import torch
import torch.nn.functional as F
from tolerances import OP, assert_near

from subquad.errors import UserError
from subquad.kernels import dispatch, ops

B, T, G, R, W, N, BEFORE = 2, 77, 2, 3, 21, 4, 30
SIZES = [(64, 64), (20, 33), (96, 80)]


def decay(kind, F):
    return {"none": None, "scalar": -torch.rand(B, T, G), "vector": -torch.rand(B, T, G, F)}[kind]


def linear(K, V, kind, dtype=torch.float32, signs=1):
    """q, k, v, beta, log_decay, initial state."""
    unit = F.normalize(torch.randn(B, T, G, K), dim=-1)
    given = [torch.randn(B, T, G * R, K), unit, torch.randn(B, T, G, V)]
    return [*(x.to(dtype) for x in given), torch.rand(B, T, G), decay(kind, K * signs), torch.randn(B, G, K * signs, V)]


def window(K, V, kind, dtype=torch.float32, signs=1):
    """q, k, v, fq, fk, mix, log_decay, initial state, sink_k, sink_v."""
    X = T + BEFORE
    given = [torch.randn(B, T, G * R, K), torch.randn(B, X, G, K), torch.randn(B, X, G, V), torch.rand(B, T, G * R, K), torch.rand(B, X, G, K)]
    sinks = torch.randn(B, N, G, K), torch.randn(B, N, G, V)
    state = torch.rand(B, G, K * signs, V + 1)
    return [*(x.to(dtype) for x in given), torch.randn(B, T, G * R), decay(kind, K * signs), state, *(x.to(dtype) for x in sinks)]


def checked(op, x, settings, feature_map=None):
    more = dict(feature_map=feature_map, backend="cpu")
    if op == "window_linear":
        names = dict(zip(("window", "sinks", "position", "scale", "output_final_state"), settings, strict=True))
        return ops.window_linear(*x[:7], initial_state=x[7], sink_k_BNGK=x[8], sink_v_BNGV=x[9], **names, **more)
    names = dict(scale=settings[0], initial_state=x[5], output_final_state=settings[1])
    if op == "additive":
        return ops.additive(*x[:3], x[4], **names, **more)
    return ops.delta(*x[:5], **names, backend="cpu")


def assert_same(found, wanted):
    assert isinstance(found, tuple) and len(found) == 2
    assert found[0].dtype == wanted[0].dtype and torch.equal(found[0], wanted[0])
    assert (found[1] is None) == (wanted[1] is None)
    assert found[1] is None or (found[1].dtype == torch.float32 and torch.equal(found[1], wanted[1]))


CALLS = [
    # op, decay, initial state, final state, dtype, feature map
    ("additive", "none", False, False, torch.float32, None),
    ("additive", "scalar", True, True, torch.float32, None),
    ("additive", "vector", True, True, torch.bfloat16, None),
    ("additive", "none", False, True, torch.bfloat16, "hedgehog_softmax"),
    ("delta", "none", False, False, torch.float32, None),
    ("delta", "scalar", True, True, torch.bfloat16, None),
    ("window_linear", "none", True, True, torch.float32, None),
    ("window_linear", "scalar", True, False, torch.bfloat16, None),
    ("window_linear", "vector", False, True, torch.float32, "hedgehog_softmax2"),
]


@pytest.mark.parametrize("K, V", SIZES)
@pytest.mark.parametrize("op, kind, begun, final, dtype, name", CALLS)
def test_the_checked_way_gives_the_same(quick, op, kind, begun, final, dtype, name, K, V):
    x = (window if op == "window_linear" else linear)(K, V, kind, dtype, 2 if name else 1)
    if op == "additive":
        x[3] = None
    if not begun:
        x[7 if op == "window_linear" else 5] = None
    settings = (W, N, 100, 0.3, final) if op == "window_linear" else (0.3, final)
    assert_same(quick[op](tuple(x), settings, name), checked(op, x, settings, name))


def test_sinks_at_the_head_of_the_keys(quick):
    x = window(64, 64, "none")
    x[1:3], x[4] = [y[:, :T] for y in x[1:3]], x[4][:, :T]
    x[7:] = None, None, None
    assert_same(quick["window_linear"](tuple(x), (W, N, 0, None, True)), checked("window_linear", x, (W, N, 0, None, True)))


def test_views_of_one_tensor(quick):
    """Queries, keys and values as slices of one projection."""
    q, k, v = torch.randn(B, T, (G * R + 2 * G) * 64).unflatten(-1, (-1, 64)).split([G * R, G, G], 2)
    assert_same(quick["additive"]((q, k, v, None, None, None), (1.0, True)), ops.additive(q, k, v, output_final_state=True, backend="cpu"))


def change(at, fn):
    return lambda x: [*x[:at], fn(x[at]), *x[at + 1 :]]


UNUSUAL = {  # of a call of delta
    "gradients": change(1, lambda k: k.requires_grad_()),
    "gradient of a state": change(5, lambda s: s.requires_grad_()),
    "values in fp16": change(2, torch.Tensor.half),
    "fp64": change(0, torch.Tensor.double),
    "sizes": change(1, lambda k: k[..., :32]),
    "tokens": change(2, lambda v: v[:, 1:]),
    "no tokens": lambda x: [y[:, :0] for y in x[:5]] + [x[5]],
    "heads": change(0, lambda q: q[:, :, :5]),
    "strided rows": change(2, lambda v: v.transpose(2, 3).contiguous().transpose(2, 3)),
    "beta in bf16": change(3, torch.Tensor.bfloat16),
    "decays in bf16": change(4, torch.Tensor.bfloat16),
    "vector decays": change(4, lambda g: g[..., None].expand(B, T, G, 64)),
    "state in bf16": change(5, torch.Tensor.bfloat16),
    "state transposed": change(5, lambda s: s.transpose(2, 3).contiguous().transpose(2, 3)),
    "another device": change(0, lambda q: q.to("meta")),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_calls_are_left_alone(quick, what):
    x = linear(64, 64, "scalar")
    assert quick["delta"](tuple(x), (1.0, True)) is not None
    assert quick["delta"](tuple(UNUSUAL[what](x)), (1.0, True)) is None


WINDOW_UNUSUAL = {
    "more slots than tokens before": (W, N, BEFORE - 1, None, False),
    "no window": (0, N, 100, None, False),
    "a scale that is no number": (W, N, 100, "one", False),
}


@pytest.mark.parametrize("what", WINDOW_UNUSUAL)
def test_unusual_windows_are_left_alone(quick, what):
    assert quick["window_linear"](tuple(window(64, 64, "none")), WINDOW_UNUSUAL[what]) is None


def test_sinks_that_must_be_cut_from_the_keys_and_unknown_maps_are_left_alone(quick):
    x = window(64, 64, "none")
    assert quick["window_linear"]((*x[:8], None, None), (W, N, 100, None, False)) is None
    assert quick["window_linear"](tuple(x), (W, N, 100, None, False), "no such map") is None


def test_auto_takes_them_from_the_second_call_and_keeps_gradients(quick, monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_quick", {})
    q, k, v, _, g, state = linear(64, 64, "scalar")
    first = ops.additive(q, k, v, g, initial_state=state, output_final_state=True)
    own = dispatch._quick["additive"]
    dispatch._quick["additive"] = lambda *x: taken.append(own(*x)) or taken[-1]
    assert_same(ops.additive(q, k, v, g, initial_state=state, output_final_state=True), first)
    with torch.inference_mode():
        assert_same(ops.additive(torch.nn.Parameter(q), k, v, g, initial_state=state, output_final_state=True), first)
    assert [x is None for x in taken] == [False, False]
    q.requires_grad_()
    o, _ = ops.additive(q, k, v, g, initial_state=state)
    o.sum().backward()
    wanted, _ = ops.additive(*(x.double() for x in (q, k, v, g)), initial_state=state.double(), backend="definition")
    assert_near(q.grad, torch.autograd.grad(wanted.sum(), q)[0], OP)
    with pytest.raises(UserError, match="v has shape"):
        ops.additive(q, k, v[:, 1:], g)


def test_other_instruction_sets(other_isa, quick):
    for op in ("additive", "delta", "window_linear"):
        x = (window if op == "window_linear" else linear)(20, 33, "scalar")
        x[3] = None if op == "additive" else x[3]
        settings = (W, N, 100, 0.3, True) if op == "window_linear" else (0.3, True)
        assert_same(quick[op](tuple(x), settings), checked(op, x, settings))
