"""Feature maps as the weights they stand for: phi(q).phi(k) against the published function of q and k.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K head size.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import MIXER, assert_near

from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, features_of, make_map
from subquad.linearize.mixers.products import quadratic, second_order

G, R, K, T = 2, 2, 12, 9
OPTIONS = {"features": 0, "horizon": 100}


def sides(name: str):
    """(map of queries, map of keys, q [1, T, G, R, K], k [1, T, G, K]), parameters as built."""
    torch.manual_seed(0)
    q, k = torch.randn(1, T, G, R, K), torch.randn(1, T, G, K)
    maps = [make_map(name, side, heads, K, OPTIONS) for side, heads in (("q", (G, R)), ("k", (G,)))]
    if hasattr(maps[0], "tie"):
        maps[0].tie(maps[1])
    return *maps, q, k


def weights(name: str) -> torch.Tensor:
    """[1, G, R, T, T]"""
    map_q, map_k, q, k = sides(name)
    position = torch.arange(T)[None]
    q, k = map_q(q, position), map_k(k, position)
    q = q.exp() if "q" in FEATURE_MAPS[name].exponential else q
    k = k.exp() if "k" in FEATURE_MAPS[name].exponential else k
    return torch.einsum("btgrf,bjgf->bgrtj", q, k)


def of(function, name: str = "identity") -> torch.Tensor:
    """function(q [.., T, 1, K], k [.., 1, T, K]) for every pair: [1, G, R, T, T]."""
    _, _, q, k = sides(name)
    return function(q.permute(0, 2, 3, 1, 4).unsqueeze(4), k.permute(0, 2, 1, 3)[:, :, None, None])


def dot(q, k):
    return (q * k).sum(-1)


def cosine(q, k):
    return F.cosine_similarity(q, k, dim=-1)


def distance():
    return torch.arange(T)[:, None] - torch.arange(T)[None]


SCALE = K**-0.25
WEIGHTS = {
    "elu1": lambda q, k: dot(F.elu(q * SCALE) + 1, F.elu(k * SCALE) + 1),
    "elu1_quarter": lambda q, k: dot(F.elu(q) + 1, F.elu(k) + 1) / K**0.5,
    "relu": lambda q, k: dot(q.relu(), k.relu()),
    "unit_norm": cosine,
    "identity": dot,
    "scaled": lambda q, k: dot(q, k) / K**0.5,
    "silu": lambda q, k: dot(F.silu(q), F.silu(k)),
    "sigmoid": lambda q, k: dot(torch.sigmoid(q * SCALE), torch.sigmoid(k * SCALE)),
    "quadratic": lambda q, k: dot(q, k).square() / K,
    "fast1": lambda q, k: 1 + cosine(q, k),
    "fast2": lambda q, k: 1 + cosine(q, k) + cosine(q, k).square() / 2,
    "taylor": lambda q, k: 1 + cosine(q, k) + cosine(q, k).square() / 2,
    "cosine": lambda q, k: dot(q.relu(), k.relu()) / K**0.5 * torch.cos(math.pi * distance() / 200),
    "log_normal": lambda q, k: dot((q * SCALE).exp(), (k * SCALE).exp()),
    "normed": lambda q, k: dot(q, F.layer_norm(k, (K,))),
    "hedgehog_exp": lambda q, k: dot((q * SCALE).exp(), (k * SCALE).exp()) + dot((-q * SCALE).exp(), (-k * SCALE).exp()),
    "efficient": lambda q, k: dot((q * SCALE).softmax(-1), (k * SCALE).exp()),
    "silu_unit": lambda q, k: cosine(F.silu(q), F.silu(k)),
    "relu_linear": lambda q, k: dot(q.relu(), k.relu()) / K**0.5,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    assert_near(weights(name), of(WEIGHTS[name]), MIXER)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_width_and_sign(name):
    map_q, map_k, q, k = sides(name)
    position = torch.arange(T)[None]
    for features in (map_q(q, position), map_k(k, position)):
        assert features.shape[-1] == features_of(name, K, OPTIONS) and features.dtype == torch.float32
    if FEATURE_MAPS[name].positive:
        assert (weights(name) >= 0).all(), "a positive map gives weights that are never negative"


def test_random_features_estimate_the_exponential():
    """exp(q.k / sqrt(K)) as a mean over many features: within a few percent for short vectors, for Performer and for its mixture as built."""
    for name in ("favor", "gmm"):
        torch.manual_seed(0)
        map_q, map_k = (make_map(name, side, heads, K, {"features": 12000}) for side, heads in (("q", (G, R)), ("k", (G,))))
        if hasattr(map_q, "tie"):
            map_q.tie(map_k)
        q, k = torch.randn(1, T, G, R, K) / 2, torch.randn(1, T, G, K) / 2
        found = torch.einsum("btgrf,bjgf->bgrtj", map_q(q).exp(), map_k(k).exp())
        wanted = (torch.einsum("btgrk,bjgk->bgrtj", q, k) / K**0.5).exp()
        assert ((found / wanted).log().abs().mean() < 0.05).item(), name


def test_focused_keeps_the_length_and_sharpens():
    map_q, _, q, _ = sides("focused")
    u = ((q * SCALE).relu() + 1e-6) / F.softplus(torch.zeros(()))
    assert_near(map_q(q), u.norm(dim=-1, keepdim=True) * F.normalize(u**3, dim=-1), MIXER)


def test_codes_and_codewords():
    map_q, map_k, q, k = sides("codes")
    codes = [torch.sign(torch.einsum("gnk,btgk->btgn", map_k.planes, F.normalize(x, dim=-1))) for x in (q[:, :, :, 0], k)]
    wanted = 17 + torch.einsum("btgn,bjgn->bgtj", *codes)
    assert_near(weights("codes")[:, :, 0], wanted, MIXER)
    assert wanted.min() >= 1
    _, map_k, q, k = sides("codebook")
    nearest = torch.cdist(k.transpose(1, 2)[0], map_k.codewords).argmin(-1)  # [G, T]
    words = torch.stack([map_k.codewords[g, nearest[g]] for g in range(G)])
    assert_near(weights("codebook"), (torch.einsum("btgrk,gjk->bgrtj", q, words) / K**0.5).exp(), MIXER)


def test_norm_power():
    """NaLaFormer: |q|-dependent power of the direction's positive and negative part, cubes of the key's."""
    map_q, map_k, q, k = sides("norm_power")
    x, y = q * SCALE, k * SCALE
    power = 3 * (0.5 + torch.tanh(x.norm(dim=-1, keepdim=True)))
    direction = F.normalize(x, dim=-1)
    assert_near(map_q(q), torch.cat([direction.relu() ** power, (-direction).relu() ** power], -1), MIXER)
    assert_near(map_k(k), torch.cat([(y**3).relu(), ((-y) ** 3).relu()], -1), MIXER)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("products", [quadratic, second_order])
def test_gradient_of_products(products, size):
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(products, torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True))
