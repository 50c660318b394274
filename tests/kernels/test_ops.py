"""Every op on every backend against its definition in fp64: outputs, final states, gradients of every tensor.

The cases cover lengths 1, 31, 64, 77, 250, 1000, sizes 32, 64, 80, 128, K != V, 1 / 3 / 8 query heads per key/value head, packed sequences (an empty one
and one of one token among them), initial states, decays near -20 and near 0, repeated keys and beta near 1, without being their product.

Key: as in subquad/kernels/ops.py; R query heads per key/value head.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from tolerances import OP, OP_GRADIENT, assert_near
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from subquad.errors import UserError
from subquad.kernels import dispatch, ops
from subquad.kernels.cpu import build
from subquad.kernels.features import FUSED

D64 = torch.float64
BACKENDS = ["torch", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and isinstance(build.library(), str):
        pytest.skip(f"no C++ here: {build.library()}")
    return request.param


def randn(*shape):
    return torch.randn(*shape, dtype=D64)


def decay(kind: str, B: int, T: int, G: int, K: int):
    """none, or natural logs: weak as mixers start with; strong down to -20; and one strong step among weak ones."""
    if kind == "none":
        return None
    g = -torch.rand(*((B, T, G, K) if kind.startswith("vector") else (B, T, G)), dtype=D64)
    if kind.endswith("strong"):
        return g * 20
    if kind.endswith("mixed"):
        return torch.where(torch.rand_like(g) < 0.1, -20.0, 1e-3 * g)
    return g * 0.1


def packing(T: int, packed: bool):
    return torch.tensor([0, 1, 1, T // 2, T]) if packed else None


#          T   K    V    G  R  decay            packed  state
LINEAR = [
    (1, 32, 32, 2, 1, "scalar", False, True),
    (31, 64, 32, 2, 3, "none", False, False),
    (64, 64, 64, 1, 8, "scalar strong", False, True),
    (77, 80, 128, 1, 3, "scalar mixed", False, True),
    (250, 128, 64, 1, 1, "none", True, True),
    (250, 64, 65, 2, 1, "scalar", True, False),
    (1000, 32, 32, 1, 1, "scalar", False, True),
    (130, 17, 5, 2, 3, "scalar", False, True),  # no size is a multiple of a vector's
]
VECTOR = [
    (1, 32, 32, 2, 1, "vector", False, True),
    (77, 64, 32, 1, 3, "vector strong", False, True),
    (100, 80, 17, 1, 1, "vector mixed", True, True),
    (250, 128, 64, 1, 2, "vector", False, False),
]


def linear_case(T, K, V, G, R, kind, packed, state, unit=False):
    torch.manual_seed(T + K)
    B = 1 if packed else 2
    k = randn(B, T, G, K)
    leaves = {
        "q_BTHK": randn(B, T, G * R, K),
        "k_BTGK": torch.nn.functional.normalize(k, dim=-1) if unit else k,
        "v_BTGV": randn(B, T, G, V),
        "initial_state": randn(4 if packed else B, G, K, V) if state else None,
    }
    return leaves, {"scale": 0.3, "output_final_state": True, "cu_seqlens": packing(T, packed)}, decay(kind, B, T, G, K)


def results(fn, leaves: dict, other: dict, dtype: torch.dtype, backend: str):
    """(outputs, gradients) of a loss that reads every differentiable output."""
    leaves = {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    outs = [x for x in fn(**leaves, **other, backend=backend) if x is not None]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=D64) for x in outs]
    sum((x * w.to(x.dtype)).sum() for x, w in zip(outs, weights, strict=True) if x.requires_grad).backward()
    return [x.detach() for x in outs], {name: x.grad for name, x in leaves.items() if x is not None}


def compare(fn, leaves: dict, other: dict, backend: str) -> None:
    outs, gradients = results(fn, leaves, other, torch.float32, backend)
    wanted, wanted_gradients = results(fn, leaves, other, D64, "definition")
    for i, (found, want) in enumerate(zip(outs, wanted, strict=True)):
        assert_near(found, want, OP, f"result {i}")
    # A gradient that is zero because two large numbers cancel (one key: its softmax weight is 1 whatever q is) is judged beside the others.
    largest = max(x.abs().max() for x in wanted_gradients.values())
    for name, want in wanted_gradients.items():
        if want.abs().max() < 1e-6 * largest:
            assert (gradients[name].double() - want).abs().max() <= 1e-6 * largest, f"gradient of {name}"
        else:
            assert_near(gradients[name], want, OP_GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("case", LINEAR + VECTOR, ids=str)
def test_additive(case, backend):
    leaves, other, g = linear_case(*case)
    compare(ops.additive, {**leaves, "log_decay": g}, other, backend)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_delta(case, backend):
    leaves, other, g = linear_case(*case, unit=True)
    beta = torch.rand(*leaves["k_BTGK"].shape[:3], dtype=D64)
    compare(ops.delta, {**leaves, "log_decay_BTG": g, "beta_BTG": beta}, other, backend)


def test_delta_with_repeated_keys_and_full_writes(backend):
    """Three keys again and again, beta 1 - 1e-4: the triangular system at its worst."""
    leaves, other, g = linear_case(250, 32, 32, 1, 2, "scalar mixed", False, True, unit=True)
    leaves["k_BTGK"] = leaves["k_BTGK"][:, torch.arange(250) % 3]
    compare(ops.delta, {**leaves, "log_decay_BTG": g, "beta_BTG": torch.full((2, 250, 1), 1 - 1e-4, dtype=D64)}, other, backend)


#          T   K    V   G  R  window sinks before position own packed  F    decay
WINDOWS = [
    (1, 32, 32, 2, 1, 8, 2, 0, 0, False, False, 16, "none"),
    (31, 32, 32, 1, 3, 8, 0, 0, 0, False, False, 32, "vector strong"),
    (64, 64, 64, 1, 8, 16, 4, 0, 0, False, False, 64, "none"),
    (77, 64, 80, 1, 3, 16, 4, 0, 0, False, False, 128, "scalar"),
    (250, 64, 48, 2, 1, 64, 4, 0, 0, False, True, 32, "scalar mixed"),
    (250, 128, 64, 1, 1, 70, 0, 70, 70, False, False, 24, "scalar"),
    (20, 16, 16, 1, 2, 5, 2, 3, 3, False, False, 16, "none"),  # a call that goes on, with all keys: sinks at their head
    (90, 32, 24, 1, 2, 8, 4, 70, 70, False, False, 16, "scalar"),
    (130, 16, 5, 2, 3, 6, 3, 6, 100, True, False, 8, "none"),  # no size is a multiple of a vector's
    (100, 32, 32, 1, 3, 10, 4, 10, 50, True, False, 40, "vector"),
    (130, 32, 32, 1, 2, 300, 4, 0, 0, False, False, 16, "scalar"),  # nothing ever leaves
    (65, 8, 6, 2, 3, 1, 1, 0, 0, False, False, 16, "vector"),
    (150, 8, 6, 2, 3, 3, 9, 0, 0, False, False, 16, "none"),  # more sinks than window
    (1000, 32, 32, 1, 1, 128, 4, 0, 0, False, False, 32, "none"),
]


def window_case(T, K, V, G, R, window, sinks, before, position, own, packed, F, kind):
    torch.manual_seed(T + window)
    B, X = 1 if packed else 2, T + before
    leaves = {"q_BTHK": randn(B, T, G * R, K), "k_BXGK": randn(B, X, G, K), "v_BXGV": randn(B, X, G, V)}
    if own:
        leaves |= {"sink_k_BNGK": randn(B, sinks, G, K), "sink_v_BNGV": randn(B, sinks, G, V)}
    other = {"window": window, "sinks": sinks, "position": position, "cu_seqlens": packing(T, packed)}
    more = {
        "fq_BTHF": torch.rand(B, T, G * R, F, dtype=D64),
        "fk_BXGF": torch.rand(B, X, G, F, dtype=D64),
        "mix_BTH": randn(B, T, G * R),
        "log_decay": decay(kind, B, T, G, F),
        "initial_state": torch.rand(4 if packed else B, G, F, V + 1, dtype=D64),
    }
    return leaves, other, more


@pytest.mark.parametrize("normalise", (False, True))
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_banded(case, normalise, backend):
    leaves, other, _ = window_case(*case)
    compare(ops.banded, leaves, other | {"normalise": normalise}, backend)


def test_the_only_key_has_no_gradient(backend):
    """Its share is 1 whatever its score is: normalised weights give 0 to the last digit, in bf16 too."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 1, H, 48).to(dtype).requires_grad_() for H in (6, 2, 2))
        out, _, _ = ops.banded(q, k, v, window=4, sinks=1, normalise=True, backend=backend)
        (out * torch.randn(out.shape)).sum().backward()
        assert not q.grad.any() and not k.grad.any() and v.grad.any()


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_window_linear(case, backend):
    leaves, other, more = window_case(*case)
    compare(ops.window_linear, leaves | more, other | {"output_final_state": True}, backend)


# ---- feature maps inside the kernels: y goes in, and the definition maps it first ---------------------------------------------------------------------

MAPPED = {  # T, K, V, G, R, decay, packed, state of additive (K numbers before the map); window_linear takes them with a window of 16 and 4 sinks
    "one token": (1, 32, 32, 2, 1, "scalar", False, True),
    "plain, groups": (31, 64, 32, 2, 3, "none", False, False),
    "vector": (77, 32, 17, 1, 3, "vector", False, True),
    "packed": (130, 64, 48, 1, 2, "scalar mixed", True, True),
    "no size of a vector": (130, 17, 5, 2, 1, "none", False, True),
}


def mapped_case(case: tuple, feature_map: str):
    """(additive's tensors, window_linear's, other arguments of both)"""
    T, K, V, G, R, kind, packed, state = case
    leaves, other, _ = linear_case(T, K, V, G, R, kind, packed, False)
    F, N = K * FUSED[feature_map].signs, 4 if packed else 2
    q, k, v = leaves["q_BTHK"], leaves["k_BTGK"], leaves["v_BTGV"]
    gates = {"log_decay": decay(kind, *k.shape[:3], F)}
    states = [{"initial_state": torch.rand(N, G, F, columns, dtype=D64) if state else None} for columns in (V, V + 1)]
    one = {"q_BTHK": q, "k_BTGK": k, "v_BTGV": v} | gates | states[0]
    near = {"q_BTHK": randn(*q.shape[:3], 32), "k_BXGK": randn(*k.shape[:3], 32), "v_BXGV": v}
    five = near | {"fq_BTHF": q, "fk_BXGF": k, "mix_BTH": randn(*q.shape[:3])} | gates | states[1]
    return one, five, {"output_final_state": True, "cu_seqlens": other["cu_seqlens"], "feature_map": feature_map}


@pytest.mark.parametrize("feature_map", FUSED)
@pytest.mark.parametrize("name", MAPPED)
def test_feature_maps_inside(name, feature_map, backend):
    one, five, other = mapped_case(MAPPED[name], feature_map)
    compare(ops.additive, one, other, backend)
    compare(ops.window_linear, five, other | {"window": 16, "sinks": 4}, backend)


def limits_case(feature_map: str, T: int):
    """Numbers of hundreds, in some rows all of one sign (additive's tensors, window_linear's). A floor is seen where queries and keys share no large
    feature and the linear branch counts as much as the window all the same; other features are large themselves."""
    torch.manual_seed(0)
    q, k, v = 200 * randn(1, T, 2, 20), 200 * randn(1, T, 1, 20), randn(1, T, 1, 8)
    q[:, 1::3], k[:, ::5] = -q[:, 1::3].abs() - 150, -k[:, ::5].abs() - 150
    mix = torch.full((1, T, 2), 28.0 if feature_map == "hedgehog_softmax2" else -20.0, dtype=D64)
    near = {"q_BTHK": randn(1, T, 2, 16), "k_BXGK": randn(1, T, 1, 16), "v_BXGV": v}
    return {"q_BTHK": q, "k_BTGK": k, "v_BTGV": v}, near | {"fq_BTHF": q, "fk_BXGF": k, "mix_BTH": mix}


@pytest.mark.parametrize("feature_map", FUSED)
def test_features_at_the_limits(feature_map, backend):
    """Exponents at their clamp, features at their floor, softmaxes of one feature; gradients where they are flat are zeros."""
    one, five = limits_case(feature_map, 70)
    compare(ops.additive, one, {"feature_map": feature_map, "output_final_state": True}, backend)
    compare(ops.window_linear, five, {"feature_map": feature_map, "output_final_state": True, "window": 5, "sinks": 1}, backend)


def test_features_are_saved_by_nobody():
    """Backward holds y, not the twice as many features."""
    if isinstance(build.library(), str):
        pytest.skip("no C++ here")
    saved, q = [], torch.randn(1, 512, 2, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        ops.additive(q, q, q, feature_map="hedgehog_softmax", backend="cpu")
    assert not any(len(shape) == 4 and shape[:2] == (1, 512) and shape[-1] > 32 for shape in saved)


def test_a_map_that_no_kernel_has_is_named():
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(UserError, match="hedgehog_softmax2"):
        ops.additive(q, q, q, feature_map="hedgehog_softmax3")


@pytest.mark.parametrize("weight", ["softmax1", "softpick", "sigmoid", "forget", "entmax"])
@pytest.mark.parametrize("case", [WINDOWS[3], WINDOWS[4], WINDOWS[6]], ids=str)
def test_weights(weight, case):
    leaves, other, _ = window_case(*case)
    if weight == "forget":
        leaves["log_forget_BXG"] = -torch.rand(*leaves["k_BXGK"].shape[:3], dtype=D64)
    for normalise in (False, True):
        compare(ops.banded, leaves, other | {"weight": weight, "normalise": normalise}, "torch")


def test_entmax_is_a_distribution_with_zeros():
    leaves, other, _ = window_case(*WINDOWS[3])
    ones = {**leaves, "v_BXGV": torch.ones_like(leaves["v_BXGV"])}
    total, denominator, _ = ops.banded(**ones, **other, weight="entmax", backend="definition")
    assert_near(total, torch.ones_like(total), 1e-9)
    assert (denominator == 1).all()


@pytest.mark.parametrize("vector", [False, True])
def test_steps_are_the_sequence(vector, backend):
    """Token by token, states updated in place, against the ops over the whole sequence."""
    torch.manual_seed(0)
    B, T, G, R, K, V = 2, 20, 2, 3, 20, 17
    q, k, v = torch.randn(B, T, G * R, K), torch.nn.functional.normalize(torch.randn(B, T, G, K), dim=-1), torch.randn(B, T, G, V)
    g, beta = -torch.rand(*((B, T, G, K) if vector else (B, T, G))), torch.rand(B, T, G)
    wanted, final = ops.additive(q, k, v, g, scale=0.5, output_final_state=True, backend="definition")
    state = torch.zeros(B, G, K, V)
    outs = [ops.additive_step(q[:, t], k[:, t], v[:, t], state, g[:, t], scale=0.5, backend=backend) for t in range(T)]
    assert_near(torch.stack(outs, 1), wanted, OP)
    assert_near(state, final, OP)
    if vector:
        return
    wanted, final = ops.delta(q, k, v, beta, g, scale=0.5, output_final_state=True, backend="definition")
    state = torch.zeros(B, G, K, V)
    outs = [ops.delta_step(q[:, t], k[:, t], v[:, t], beta[:, t], state, g[:, t], scale=0.5, backend=backend) for t in range(T)]
    assert_near(torch.stack(outs, 1), wanted, OP)
    assert_near(state, final, OP)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_window_linear_steps_are_the_sequence(kind, backend):
    torch.manual_seed(0)
    W, N, T = 5, 2, 30
    leaves, other, more = window_case(T, 20, 17, 2, 3, W, N, 0, 0, False, False, 12, kind)
    given = {name: None if x is None else x.float() for name, x in (leaves | more).items()}
    wanted, final = ops.window_linear(**given, **other, output_final_state=True, backend="definition")
    start = W + N  # before that, fewer slots are in the window or a sink leaves it
    part = {n: x if x is None or n == "initial_state" else x[:, :start] for n, x in given.items()}
    _, state = ops.window_linear(**part, **other, output_final_state=True, backend="definition")
    q, k, v, fq, fk, mix, g = (given[n] for n in ("q_BTHK", "k_BXGK", "v_BXGV", "fq_BTHF", "fk_BXGF", "mix_BTH", "log_decay"))
    outs = []
    for t in range(start, T):
        band = slice(t - W + 1, t + 1)
        outs.append(
            ops.window_linear_step(
                q[:, t], k[:, band], v[:, band], fq[:, t], mix[:, t], state, fk[:, t - W], v[:, t - W], None if g is None else g[:, t],
                sink_k_BNGK=k[:, :N], sink_v_BNGV=v[:, :N], backend=backend,
            )
        )  # fmt: skip
    assert_near(torch.stack(outs, 1), wanted[:, start:], OP)
    assert_near(state, final, OP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype, backend):
    """Against the definition on the same rounded numbers: only the output's own rounding is added; states stay fp32."""
    step = torch.finfo(dtype).eps
    leaves, other, more = window_case(*WINDOWS[3])
    rounded = {
        name: x.to(dtype) if x is not None and name not in ("mix_BTH", "log_decay", "initial_state") else x
        for name, x in (leaves | more).items()
    }
    other = other | {"output_final_state": True}
    given = {name: x if x is None or x.dtype == dtype else x.float() for name, x in rounded.items()}
    out, state = ops.window_linear(**given, **other, backend=backend)
    wanted, wanted_state = ops.window_linear(
        **{n: None if x is None else x.double() for n, x in rounded.items()}, **other, backend="definition"
    )
    assert out.dtype == dtype and state.dtype == torch.float32
    # torch multiplies weights and values in the model's dtype; C++ in fp32
    assert_near(out, wanted, step if backend == "cpu" else 4 * step)
    assert_near(state, wanted_state, OP)


def test_any_layout_of_memory(backend):
    """Transposed, expanded and sliced tensors are read where they are."""
    leaves, other, g = linear_case(77, 64, 32, 2, 3, "scalar", False, True)
    plain = {name: x.float() for name, x in leaves.items()}
    moved = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 and name != "initial_state" else x for name, x in plain.items()
    }
    moved["v_BTGV"] = torch.cat([plain["v_BTGV"], plain["v_BTGV"]], -1)[..., :32]
    wanted = ops.additive(**plain, log_decay=g.float(), **other, backend=backend)
    for found, want in zip(ops.additive(**moved, log_decay=g.float(), **other, backend=backend), wanted, strict=True):
        assert torch.equal(found, want)


def test_the_same_numbers_every_time_and_on_any_number_of_threads(backend):
    leaves, other, more = window_case(*WINDOWS[4])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            found.append(results(ops.window_linear, leaves | more, other | {"output_final_state": True}, torch.float32, backend))
    finally:
        torch.set_num_threads(before)
    same = found if backend == "cpu" else found[:2]  # torch's own sums may be cut differently
    for outs, gradients in same[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs, found[0][0], strict=True))
        assert all(torch.equal(gradients[name], x) for name, x in found[0][1].items())


def test_backward_saves_its_inputs_and_little_more():
    if isinstance(build.library(), str):
        pytest.skip("no C++ here")
    T, K = 1024, 32
    q, k, v = (torch.randn(1, T, 1, K, requires_grad=True) for _ in range(3))
    bytes_ = 0

    def count(x):
        nonlocal bytes_
        bytes_ += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        ops.window_linear(q, k, v, q, k, q[..., 0], window=64, backend="cpu")
    assert bytes_ < 8 * q.numel() * 4  # q, k, v, fq, fk, o of T K numbers, mix and mass of T


@pytest.mark.parametrize("op", ["additive", "window_linear"])
def test_gradients_larger_than_the_caches_are_the_same_numbers(op):
    """They are streamed past the caches (tiles_source.CACHES): heads taken together against heads taken alone, which stay below that."""
    if isinstance(build.library(), str):
        pytest.skip("no C++ here")
    torch.manual_seed(0)
    T, H = 2800, 8
    q, k, v, weight = (torch.randn(1, T, H, 64) for _ in range(4))
    assert 4 * 3 * q.numel() > 16 << 20

    def gradients(*given):
        given = [x.detach().requires_grad_() for x in given[:3]] + [given[3]]
        more = {} if op == "additive" else dict(window=64, sinks=4, fq_BTHF=given[0].exp(), fk_BXGF=given[1].exp(), mix_BTH=given[0][..., 0])
        (getattr(ops, op)(*given[:3], backend="cpu", **more)[0] * given[3]).sum().backward()
        return [x.grad for x in given[:3]]

    together = gradients(q, k, v, weight)
    for h in (0, 5):
        alone = gradients(*(x[:, :, h : h + 1] for x in (q, k, v, weight)))
        assert all(torch.equal(a, b[:, :, h : h + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (1, 5, 1, 1), (2, 0, 3, 0), (2, 5, 3, 8)])
def test_gradients_seen_from_many_places_are_read_where_they_are(sizes, backend):
    """Expanded gradients of outputs (sum, mean over heads), against the same written out."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(3))
    spread = torch.randn([max(n, 1) for n in sizes]).expand(2, 5, 3, 8)
    found = torch.autograd.grad(ops.additive(q, k, v, backend=backend)[0], (q, k, v), spread)
    wanted = torch.autograd.grad(ops.additive(q, k, v, backend=backend)[0], (q, k, v), spread.contiguous())
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, OP)


def test_auto_says_once_what_it_took(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "_quick", {})
    x = torch.randn(1, 4, 1, 8)
    with caplog.at_level(logging.INFO, logger="subquad.kernels"):
        ops.additive(x, x, x)
        ops.additive(x, x, x)
    assert [r.message.partition(":")[0] for r in caplog.records].count("additive") == 1


@pytest.mark.parametrize(("backend", "why"), [("nonsense", "Unknown backend"), ("triton", "cannot run additive")])
def test_a_backend_that_cannot_run_says_why(backend, why):
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(UserError, match=why):
        ops.additive(x, x, x, backend=backend)


def test_cpu_refuses_what_it_does_not_have(backend):
    x = torch.randn(1, 4, 1, 8)
    if backend == "cpu":
        with pytest.raises(UserError, match="weight"):
            ops.banded(x, x, x, window=2, weight="sigmoid", backend="cpu")
        with pytest.raises(UserError, match="float64"):
            ops.additive(x.double(), x.double(), x.double(), backend="cpu")
    ops.banded(x, x, x, window=2, weight="sigmoid")  # auto: torch


def test_without_a_compiler_torch_does_the_work(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_quick", {})
    build.library.cache_clear()
    try:
        x = torch.randn(1, 4, 1, 8)
        with caplog.at_level(logging.WARNING, logger="subquad.kernels"):
            ops.additive(x, x, x)
            ops.additive(x, x, x)
        assert [r.levelname for r in caplog.records].count("WARNING") == 1
        with pytest.raises(UserError, match="no-such-compiler"):
            ops.additive(x, x, x, backend="cpu")
    finally:
        build.library.cache_clear()


def plain_calls():
    """Every op as a function of q [1, 70, 2, 16] and a backend."""
    k, v, fq, fk = (torch.rand(1, 70, 2, 16, dtype=D64) for _ in range(4))
    g, beta, mix = (torch.rand(1, 70, 2, dtype=D64) for _ in range(3))
    to = lambda q, *given: [x.to(q.dtype) for x in given]  # noqa: E731
    return {
        "additive": lambda q, b: ops.additive(q, *to(q, k, v, -g), backend=b)[0],
        "delta": lambda q, b: ops.delta(q, *to(q, F.normalize(k, dim=-1), v, beta, -g), backend=b)[0],
        "banded": lambda q, b: ops.banded(q, *to(q, k, v), window=8, sinks=2, normalise=True, backend=b)[0],
        "window_linear": lambda q, b: ops.window_linear(q, *to(q, k, v, fq, fk, mix, -g), window=8, sinks=2, backend=b)[0],
    }


def dual(fn, q):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(q, torch.ones_like(q)))).tangent


class Own(torch.Tensor):
    """A subclass, whose operations are its own business."""


MORE_THAN_NUMBERS = {
    "a tangent": dual,
    "jvp": lambda fn, q: torch.func.jvp(fn, (q,), (torch.ones_like(q),))[1],
    "grad": lambda fn, q: torch.func.grad(lambda x: fn(x).sum())(q),
    "vmap": lambda fn, q: torch.func.vmap(fn)(torch.stack([q, 2 * q])),
    "a subclass": lambda fn, q: fn(q.as_subclass(Own)),
}


@pytest.mark.parametrize("how", MORE_THAN_NUMBERS)
@pytest.mark.parametrize("op", ["additive", "delta", "banded", "window_linear"])
def test_tensors_that_are_more_than_numbers_go_to_torch(op, how):
    """Compiled code would lose what they carry. Twice: from its second call on `auto` skips the checks where it can."""
    fn, through, q = plain_calls()[op], MORE_THAN_NUMBERS[how], torch.randn(1, 70, 2, 16)
    fn(q, "auto"), fn(q, "auto")
    wanted = through(lambda x: fn(x, "definition"), q.double())
    for _ in range(2):
        assert_near(through(lambda x: fn(x, "auto"), q), wanted, OP_GRADIENT)
    with pytest.raises(UserError, match=r"cannot run .*compiled code"):
        through(lambda x: fn(x, "cpu"), q)


@pytest.mark.parametrize("op", ["additive", "delta", "banded", "window_linear"])
def test_tensors_of_a_trace_go_to_torch(op):
    """A FakeTensor says that it is in main memory, and has no memory."""
    with FakeTensorMode():
        fn, q = plain_calls()[op], torch.empty(1, 70, 2, 16)
        assert fn(q, "auto").shape == fn(q, "auto").shape == (1, 70, 2, 16)
        with pytest.raises(UserError, match=r"cannot run .*compiled code.*FakeTensor"):
            fn(q, "cpu")


def test_other_instruction_sets(other_isa):
    """The same source compiled for smaller vectors, on a few cases."""
    for case in (LINEAR[3], LINEAR[7], VECTOR[1]):
        leaves, other, g = linear_case(*case)
        compare(ops.additive, {**leaves, "log_decay": g}, other, "cpu")
    leaves, other, g = linear_case(*LINEAR[3], unit=True)
    compare(ops.delta, {**leaves, "log_decay_BTG": g, "beta_BTG": torch.rand(*leaves["k_BTGK"].shape[:3], dtype=D64)}, other, "cpu")
    leaves, other, more = window_case(*WINDOWS[6])
    compare(ops.window_linear, leaves | more, other | {"output_final_state": True}, "cpu")
    for feature_map in FUSED:
        compare(ops.additive, *mapped_case(MAPPED["no size of a vector"], feature_map)[::2], "cpu")


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SUBQUAD_CPU_ISA", "avx1024")
    with pytest.raises(UserError, match="avx1024"):
        build.isa()


WRONG = {
    "state of other values": (
        lambda x, s: ops.additive(x, x, x, initial_state=s[..., :3]),
        "initial_state has shape [1, 2, 8, 3], expected [N=1, G=2, F=8, V=8]",
    ),
    "query heads": (lambda x, s: ops.additive(x[:, :, :1], x, x), "1 query heads are no multiple of 2"),
    "short keys": (lambda x, s: ops.delta(x, x[:, :3], x, x[..., 0]), "k has shape [1, 3, 2, 8], expected [B=1, T=5, G, K=8]"),
    "gate per feature": (lambda x, s: ops.delta(x, x, x, x), "beta has shape"),
    "features": (lambda x, s: ops.window_linear(x, x, x, x[..., :4], x, x[..., 0], window=2), "fk has shape"),
    "step": (lambda x, s: ops.additive_step(x[:, 0], x[:, 0], x[:, 0], s[:, :1]), "state has shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_shapes_that_do_not_fit_never_reach_compiled_code(what):
    call, said = WRONG[what]
    with pytest.raises(UserError) as error:
        call(torch.randn(1, 5, 2, 8), torch.zeros(1, 2, 8, 8))
    assert any(said in problem for problem in error.value.problems), error.value.problems
