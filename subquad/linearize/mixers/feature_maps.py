"""Feature maps: functions of W x, per head. One function and one row each (SEEDS 3.2 K1).

Every function maps y = W x (+ b), fp32, to non-negative features unless its row says otherwise. The three published Hedgehogs are three rows:
their checkpoints are not interchangeable (SEEDS 0.1).

Key: B batch, T tokens, P heads (key/value heads, or G x R query heads), K head size, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureMap:
    fn: Callable[[Tensor], Tensor]
    factor: int  # features per row of W x
    positive: bool
    source: str


def hedgehog_exp(y: Tensor) -> Tensor:
    """[exp(y); exp(-y)] (the paper). Clamped at 30 so that a product of two features stays inside fp32."""
    y = y.clamp(-30, 30)
    return torch.cat([y.exp(), (-y).exp()], -1)


def hedgehog_softmax2(y: Tensor) -> Tensor:
    """[softmax(y); softmax(-y)] (LoLCATs)."""
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12)


def hedgehog_softmax(y: Tensor) -> Tensor:
    """One softmax over [2y, -2y] (flash-linear-attention)."""
    return torch.cat([2 * y, -2 * y], -1).softmax(-1)


def unit(y: Tensor) -> Tensor:
    """y / |y|: what the delta rule needs; signed."""
    return F.normalize(y, dim=-1)


FEATURE_MAPS = {
    "hedgehog_exp": FeatureMap(hedgehog_exp, 2, True, "SEEDS A03 (paper form)"),
    "hedgehog_softmax2": FeatureMap(hedgehog_softmax2, 2, True, "SEEDS A03 (LoLCATs form)"),
    "hedgehog_softmax": FeatureMap(hedgehog_softmax, 2, True, "SEEDS A03 (one softmax over both signs)"),
    "unit": FeatureMap(unit, 1, False, "SEEDS B01"),
}


class LearnedMap(nn.Module):
    """phi(W x) with one W per head, identity at the start, computed in fp32.

    [B, T, *heads, K] -> [B, T, *heads, factor * K]. `heads` is (G,) for keys and (G, R) for queries: keys are mapped once per key/value head.
    """

    def __init__(self, name: str, heads: tuple[int, ...], size: int, scale: float = 1.0):
        super().__init__()
        self.map = FEATURE_MAPS[name]
        self.scale = scale
        self.weight = nn.Parameter(torch.eye(size).repeat(*heads, 1, 1))  # [*heads, K, K]

    def forward(self, x: Tensor) -> Tensor:
        letters = "gr"[: self.weight.dim() - 2]
        y = torch.einsum(f"bt{letters}k,{letters}kf->bt{letters}f", x.float() * self.scale, self.weight.float())
        return self.map.fn(y)
