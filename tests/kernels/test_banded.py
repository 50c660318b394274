"""Op 3: banded attention in blocks, fp32, against every pair written out in fp64.

Numerator and denominator are relative to a maximum that either form may choose; compared is what callers use: their quotient, and the logarithm of the mass.

Key: B batch, T new tokens, X slots, W window, N sinks, G key/value heads, R query heads per key/value head, K key size, V value size.
"""

import pytest
import torch
from tolerances import OP, OP_GRADIENT, assert_near

from subquad.kernels.banded import banded_blocks, banded_definition

B, G, K, V, N = 2, 2, 8, 5, 3
LENGTHS = (1, 5, 63, 64, 65, 130, 500)
WINDOWS = (1, 6, 64, 100)

FEATURES = {  # what -> which optional inputs are given
    "plain": (),
    "invalid": ("valid",),
    "sinks": ("sinks",),
    "softcap": ("softcap",),
    "learned sinks": ("logit",),
    "everything": ("valid", "sinks", "softcap", "logit"),
}


def inputs(length: int, window: int, before: int, features: tuple, groups: int = 3) -> tuple[dict, dict]:
    """(tensors with gradients, other arguments)."""
    torch.manual_seed(length + 1000 * window)
    numbers, slots = dict(dtype=torch.float64), before + length
    leaves = {
        "q": torch.randn(B, length, G, groups, K, **numbers),
        "k": torch.randn(B, slots, G, K, **numbers),
        "v": torch.randn(B, slots, G, V, **numbers),
    }
    other: dict = {"window": window, "scale": 0.7}
    if "valid" in features:
        other["valid_BX"] = torch.rand(B, slots) > 0.3  # some queries see nothing at all
    if "softcap" in features:
        other["softcap"] = 1.5
    if "sinks" in features:
        leaves |= {"sink_k": torch.randn(B, N, G, K, **numbers), "sink_v": torch.randn(B, N, G, V, **numbers)}
        other["sink_seen_BTN"] = torch.rand(B, length, N) > 0.5
    if "logit" in features:
        leaves["sink_logit_GR"] = torch.randn(G, groups, **numbers)
    return leaves, other


def results(fn, leaves: dict, other: dict, dtype: torch.dtype):
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    q, k, v, *_ = leaves.values()
    numerator, denominator, top = fn(q, k, v, **{n: x for n, x in leaves.items() if n not in "qkv"}, **other)
    seen = denominator > 0
    output = numerator / denominator.clamp_min(1e-30)[..., None]
    mass = torch.where(seen, denominator.clamp_min(1e-30).log() + top, 0.0)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in (output, mass))
    loss.backward()
    return output.detach(), mass.detach(), seen, {name: x.grad for name, x in leaves.items()}


def every_pair(q, k, v, *, window, sink_k=None, sink_v=None, sink_seen_BTN=None, valid_BX=None, **more):
    """The definition, with what a query sees written out."""
    T, X = q.shape[1], k.shape[1]
    t, j = torch.arange(T)[:, None] + (X - T), torch.arange(X)
    seen = ((j <= t) & (j > t - window)).expand(B, -1, -1)
    seen = seen if valid_BX is None else seen & valid_BX[:, None]
    if sink_k is not None:
        k, v, seen = torch.cat([sink_k, k], 1), torch.cat([sink_v, v], 1), torch.cat([sink_seen_BTN, seen], -1)
    return banded_definition(q, k, v, seen, window=window, **more)


def compare(leaves: dict, other: dict) -> None:
    output, mass, seen, gradients = results(banded_blocks, leaves, other, torch.float32)
    wanted_output, wanted_mass, wanted_seen, wanted_gradients = results(every_pair, leaves, other, torch.float64)
    assert torch.equal(seen, wanted_seen)
    assert_near(output, wanted_output, OP, "output")
    assert_near(mass, wanted_mass, OP, "log mass")
    for name, gradient in gradients.items():
        assert_near(gradient, wanted_gradients[name], OP_GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_are_the_definition(window, length):
    """With everything on, from an empty window, a young one, a full one, and with more slots than any query sees."""
    for before in sorted({0, min(3, window), window, window + 70}):
        compare(*inputs(length, window, before, FEATURES["everything"]))


@pytest.mark.parametrize("what", FEATURES)
@pytest.mark.parametrize("length", (5, 130))
def test_one_thing_at_a_time(what, length):
    compare(*inputs(length, 6, 4, FEATURES[what]))


@pytest.mark.parametrize("groups", (1, 3, 8))
@pytest.mark.parametrize("length", (5, 130))
def test_query_groups_share_keys(groups, length):
    compare(*inputs(length, 6, 4, FEATURES["everything"], groups))


def test_a_query_that_sees_nothing_gets_zeros():
    leaves, other = inputs(5, 6, 0, ())
    other["valid_BX"] = torch.zeros(B, 5, dtype=torch.bool)
    output, _, seen, gradients = results(banded_blocks, leaves, other, torch.float32)
    assert not seen.any() and not output.any()
    assert all(not x.any() for x in gradients.values())  # and no NaN: NaN is truthy


@pytest.mark.parametrize("length", (5, 130))
def test_large_logits_stay_finite(length):
    leaves, other = inputs(length, 6, 4, FEATURES["sinks"])
    leaves["q"] = leaves["q"] * 1000
    output, mass, _, gradients = results(banded_blocks, leaves, other, torch.float32)
    assert all(x.isfinite().all() for x in (output, mass, *gradients.values()))


def test_cost_grows_with_the_window_not_the_square():
    """No tensor of T x T numbers: at 4,096 tokens that would be 16 M numbers a head, blocks need 0.5 M."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    length = 4096
    q, k = torch.randn(1, length, 1, 1, K), torch.randn(1, length, 1, K)
    with Watch(), torch.no_grad():
        banded_blocks(q, k, k, window=64, scale=1.0)
    assert largest <= 2 * 64 * length
