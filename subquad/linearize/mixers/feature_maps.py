"""Feature maps: what queries and keys become before they meet (SEEDS 3.2 K1). One function and one row each.

A row's function maps y = W x (+ b), fp32; those that ops apply inside their kernels are in kernels/features.py. The three published Hedgehogs are three
rows: their checkpoints are not interchangeable (SEEDS 0.1).
Maps with parameters or buffers of their own are modules in other files, named by their row.

Key: B batch, T tokens, P heads (key/value heads, or G x R query heads), K head size, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.features import FUSED, hedgehog_exp, hedgehog_softmax, hedgehog_softmax2, softmax
from subquad.linearize.mixers.products import pairs, quadratic, second_order
from subquad.registry import lookup


@dataclass(frozen=True)
class FeatureMap:
    fn: Callable[[Tensor], Tensor] | None
    factor: int  # features per row of W x
    positive: bool  # features are never negative: a sum of them can divide
    source: str
    k_fn: Callable[[Tensor], Tensor] | None = None  # where keys are mapped otherwise
    weight: bool = True  # a learned W in front, identity at the start
    bias: bool = False
    width: Callable[[int], int] | None = None  # features of a head of K numbers, where that is not factor x K
    exponential: str = ""  # sides (q, k, qk) for which the function gives log features; the cell keeps their maximum out of the exponent
    module: str = ""  # a key of MODULES: a map with parameters of its own
    tempered: bool = True  # takes K^(-1/4) q and K^(-1/4) k, so that W = identity has the teacher's logit scale; otherwise q and k as they are
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs
    unit: bool = False  # features are of unit length
    positions: bool = False  # asks where queries and keys stand
    least: float = 1e-6  # the smallest divisor: where products of features of both signs cancel, what is left of a small sum is rounding
    fit: str = ""  # what calibration.py sets before training: a row of FITS

    @property
    def floor(self) -> float:
        return 1e-30 if self.exponential else self.least

    @property
    def fused(self) -> str | None:
        """The name by which ops apply the map to `numbers` inside their kernels; None: they take features."""
        return next((name for name, row in FUSED.items() if row.plain is self.fn and self.k_fn is None), None)


def unit(y: Tensor) -> Tensor:
    """y / |y|: what the delta rule needs; signed."""
    return F.normalize(y, dim=-1)


def silu_unit(y: Tensor) -> Tensor:
    """SiLU, then unit length (DeltaNet)."""
    return F.normalize(F.silu(y), dim=-1)


def identity(y: Tensor) -> Tensor:
    return y


def elu1(y: Tensor) -> Tensor:
    return F.elu(y) + 1


def elu1_quarter(y: Tensor) -> Tensor:
    """K^(-1/4) (elu(y) + 1): products are divided by sqrt(K), as magnitude-aware weights want them."""
    return elu1(y) * y.shape[-1] ** -0.25


def bounded_exp(y: Tensor) -> Tensor:
    """exp(y); clamped at 30, so that sums of many keys stay inside fp32."""
    return y.clamp(-30, 30).exp()


def norm_power_q(y: Tensor) -> Tensor:
    """NaLaFormer queries: signed split of the direction to the power 3 (1/2 + tanh |y|)."""
    norm = y.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(norm))
    direction = y / norm.clamp_min(1e-6)
    # pow has no gradient at 0: the floor stands for it, and features at the floor are set to 0.
    parts = [torch.where(d > 1e-6, d.clamp_min(1e-6) ** power, 0.0) for d in (direction, -direction)]
    return torch.cat(parts, -1)


def norm_power_k(y: Tensor) -> Tensor:
    """NaLaFormer keys: [ReLU(y^3); ReLU(-y^3)]."""
    cube = y.clamp(-1e4, 1e4) ** 3
    return torch.cat([cube.relu(), (-cube).relu()], -1)


def taylor1(y: Tensor) -> Tensor:
    """[1; y / |y|]: weight 1 + cos, never negative (FAST, p = 1)."""
    y = F.normalize(y, dim=-1)
    return torch.cat([torch.ones_like(y[..., :1]), y], -1)


def taylor2(y: Tensor) -> Tensor:
    """[1; y^; y^ x y^ / sqrt 2] of the direction y^: weight 1 + s + s^2 / 2 >= 1/2 (FAST, p = 2)."""
    return second_order(F.normalize(y, dim=-1))


def _plus_one(size: int) -> int:
    return size + 1


def _second_order(size: int) -> int:
    return 1 + size + pairs(size)


def _row(fn, source: str, factor: int = 1, positive: bool = True, weight: bool = False, **more) -> FeatureMap:
    return FeatureMap(fn, factor, positive, source, weight=weight, **{"tempered": positive, **more})


def _module(name: str, source: str, positive: bool = True, **more) -> FeatureMap:
    return _row(None, source, 0, positive, module=name, **more)


MODULES = {
    "favor": "subquad.linearize.mixers.random_features:Favor",
    "gmm": "subquad.linearize.mixers.random_features:Mixture",
    "cosine": "subquad.linearize.mixers.shaped_features:Cosine",
    "log_normal": "subquad.linearize.mixers.shaped_features:LogNormal",
    "focused": "subquad.linearize.mixers.shaped_features:Focused",
    "taylor": "subquad.linearize.mixers.shaped_features:Taylor",
    "normed": "subquad.linearize.mixers.shaped_features:Normed",
    "polynomial": "subquad.linearize.mixers.shaped_features:Polynomial",
    "codes": "subquad.linearize.mixers.coded_features:Codes",
    "codebook": "subquad.linearize.mixers.coded_features:Codebook",
}

FEATURE_MAPS = {
    "hedgehog_exp": FeatureMap(hedgehog_exp, 2, True, "SEEDS A03 (paper form)", fit="sharpness"),
    "hedgehog_softmax2": FeatureMap(hedgehog_softmax2, 2, True, "SEEDS A03 (LoLCATs form)", fit="sharpness"),
    "hedgehog_softmax": FeatureMap(hedgehog_softmax, 2, True, "SEEDS A03 (one softmax over both signs)", fit="sharpness"),
    "unit": _row(unit, "SEEDS B01", positive=False, weight=True, unit=True),
    "silu_unit": _row(silu_unit, "SEEDS B01", positive=False, weight=True, unit=True),
    "unit_norm": _row(unit, "SEEDS A04", positive=False, unit=True),
    "identity": _row(identity, "SEEDS B13", positive=False),
    "scaled": _row(identity, "SEEDS A10", positive=False, tempered=True),
    "silu": _row(F.silu, "SEEDS B04", positive=False),
    "relu": _row(F.relu, "SEEDS A09, A14", tempered=False),
    "relu_linear": _row(F.relu, "SEEDS Dependencies, T2R; G01", weight=True, bias=True),
    "elu1": _row(elu1, "SEEDS Dependencies, Linear Transformer; A11"),
    "elu1_quarter": _row(elu1_quarter, "SEEDS A12", tempered=False),
    "sigmoid": _row(torch.sigmoid, "SEEDS A07"),
    "softmax": _row(softmax, "SEEDS A24, Liger"),
    "efficient": _row(softmax, "SEEDS A06", k_fn=bounded_exp),
    "norm_power": _row(norm_power_q, "SEEDS A13", factor=2, k_fn=norm_power_k),
    "fast1": _row(taylor1, "SEEDS A26", width=_plus_one),
    "fast2": _row(taylor2, "SEEDS A26", width=_second_order),
    "quadratic": _row(quadratic, "SEEDS E08, p = 2", positive=True, width=pairs, least=0.1),
    "favor": _module("favor", "SEEDS A01", exponential="qk", takes=("features",)),
    "gmm": _module("gmm", "SEEDS A21", exponential="qk", takes=("features",)),
    "cosine": _module("cosine", "SEEDS A02", positions=True, takes=("horizon",)),
    "log_normal": _module("log_normal", "SEEDS A15", exponential="qk", fit="log_normal"),
    "focused": _module("focused", "SEEDS A08"),
    "taylor": _module("taylor", "SEEDS A05"),
    "normed": _module("normed", "SEEDS A23", positive=False),
    "polynomial": _module("polynomial", "SEEDS C02"),
    "codes": _module("codes", "SEEDS A17", takes=("features",)),
    "codebook": _module("codebook", "SEEDS A19", exponential="q", fit="codebook", takes=("features",)),
}


class LearnedMap(nn.Module):
    """phi(W x + b) with one W per head, identity at the start, computed in fp32; phi(x) for rows without a weight.

    [B, T, *heads, K] -> [B, T, *heads, F]. `heads` is (G,) for keys and (G, R) for queries: keys are mapped once per key/value head.
    """

    def __init__(self, name: str, heads: tuple[int, ...], size: int, scale: float = 1.0, side: str = "q"):
        super().__init__()
        row = FEATURE_MAPS[name]
        self.fn = row.k_fn if side == "k" and row.k_fn is not None else row.fn
        self.map, self.scale, self.heads = row, scale, heads
        if row.weight:
            self.weight = nn.Parameter(torch.eye(size).repeat(*heads, 1, 1))  # [*heads, K, K]
        if row.bias:
            self.bias = nn.Parameter(torch.zeros(*heads, size))

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        return self.fn(self.numbers(x))

    def numbers(self, x: Tensor) -> Tensor:
        """What phi is applied to, fp32."""
        letters = "gr"[: len(self.heads)]
        y = x.float() * self.scale
        if self.map.weight:
            y = torch.einsum(f"bt{letters}k,{letters}kf->bt{letters}f", y, self.weight.float())
        if self.map.bias:
            y = y + self.bias.float()
        return y

    def untouched(self) -> bool:
        """W is what it was built with."""
        return torch.equal(self.weight, torch.eye(self.weight.shape[-1]).to(self.weight).expand_as(self.weight))

    def sharpen(self, by: Tensor) -> None:
        """Multiply W by a number per head."""
        self.weight.mul_(by[..., None, None])


def make_map(name: str, side: str, heads: tuple[int, ...], size: int, options: dict) -> nn.Module:
    """The map of queries (side q) or keys (side k)."""
    row = FEATURE_MAPS[name]
    scale = size**-0.25 if row.tempered else 1.0
    if row.module:
        return lookup("feature map", row.module, MODULES)(side, heads, size, scale, **options)
    return LearnedMap(name, heads, size, scale, side)


def features_of(name: str, size: int, options: dict) -> int:
    """Features of a head of `size` numbers."""
    row = FEATURE_MAPS[name]
    if row.module:
        return lookup("feature map", row.module, MODULES).width(size, **options)
    return row.factor * size if row.width is None else row.width(size)
