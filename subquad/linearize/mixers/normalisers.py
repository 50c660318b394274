"""Normalisers: what is done with the state's answer (SEEDS 3.2 K4). With Z = q.z, n the count, y = S^T q, u = sum v:

    sum        y / Z                                   clamped    tau y / max(Z, 100), tau learned per query head
    centred    y / n + (1 - Z / n) u / n               magnitude  (1 + n / Z) y / n - Z u / n^2      (MALA, token means: the code)
    magnitude_sum  (1 + 1 / Z) y - Z u / n             (MALA, token sums: the paper)
    count      n^(-sigmoid(p)) y, p learned per query head       mean   y / n
    feature    sum_r q_r S[r] / z[r]                   flow       sigmoid(I^) y / Z                   none       y

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, V value size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape

EPS = 1e-6


@dataclass(frozen=True)
class NormaliserRow:
    rule: Callable[["Normaliser", "Sums"], Tensor]
    about: str
    source: str
    divides: bool = False  # by a sum of features: needs maps that are never negative
    counts: bool = False  # uses the count and the sum of values: nothing may fade
    parameter: str = ""  # a learned number per query head
    per_feature: bool = False  # every feature of the query is divided by its own sum over the keys, before the read


@dataclass
class Sums:
    """What the state answers: y [.., V], total Z [..], each per query head; u [B, T, G, V] and n [B, T] where they are kept."""

    y: Tensor
    total: Tensor | None = None
    u: Tensor | None = None
    n: Tensor | None = None
    allocation: Tensor | None = None  # I^ of Flow-Attention
    eps: float = EPS  # the smallest divisor


class Normaliser(nn.Module):
    """Sums -> output [B, T, G, R, V]."""

    def __init__(self, name: str, shape: HeadShape):
        super().__init__()
        self.row = NORMALISERS[name]
        if self.row.parameter == "tau":
            self.tau = nn.Parameter(torch.ones(shape.kv_heads, shape.groups))
        if self.row.parameter == "power":
            self.power = nn.Parameter(torch.full((shape.kv_heads, shape.groups), 0.5))

    def forward(self, sums: Sums) -> Tensor:
        return self.row.rule(self, sums)


def _n(sums: Sums) -> Tensor:
    """[B, T, 1, 1, 1], at least 1."""
    return sums.n.clamp_min(1)[..., None, None, None]


def _sum(self: Normaliser, s: Sums) -> Tensor:
    return s.y / s.total.clamp_min(s.eps).unsqueeze(-1)


def _clamped(self: Normaliser, s: Sums) -> Tensor:
    return self.tau.float().unsqueeze(-1) * s.y / s.total.clamp_min(100.0).unsqueeze(-1)


def _centred(self: Normaliser, s: Sums) -> Tensor:
    n = _n(s)
    return s.y / n + (1 - s.total.unsqueeze(-1) / n) * s.u.unsqueeze(3) / n


def _magnitude(self: Normaliser, s: Sums) -> Tensor:
    n, total = _n(s), s.total.unsqueeze(-1)
    return (1 / n + 1 / total.clamp_min(EPS)) * s.y - total * s.u.unsqueeze(3) / n.square()


def _magnitude_sum(self: Normaliser, s: Sums) -> Tensor:
    n, total = _n(s), s.total.unsqueeze(-1)
    return (1 + 1 / total.clamp_min(EPS)) * s.y - total * s.u.unsqueeze(3) / n


def _count(self: Normaliser, s: Sums) -> Tensor:
    return s.y * _n(s) ** -torch.sigmoid(self.power.float()).unsqueeze(-1)


def _mean(self: Normaliser, s: Sums) -> Tensor:
    return s.y / _n(s)


def _flow(self: Normaliser, s: Sums) -> Tensor:
    return torch.sigmoid(s.allocation).unsqueeze(-1) * _sum(self, s)


def _plain(self: Normaliser, s: Sums) -> Tensor:
    return s.y


NORMALISERS = {
    "sum": NormaliserRow(_sum, "y / Z", "SEEDS K4", divides=True),
    "clamped": NormaliserRow(_clamped, "tau y / max(Z, 100)", "SEEDS A14, 0.7", divides=True, parameter="tau"),
    "centred": NormaliserRow(_centred, "y / n + (1 - Z / n) u / n", "SEEDS A10", counts=True),
    "magnitude": NormaliserRow(_magnitude, "(1 + n / Z) y / n - Z u / n^2", "SEEDS A12, code", divides=True, counts=True),
    "magnitude_sum": NormaliserRow(_magnitude_sum, "(1 + 1 / Z) y - Z u / n", "SEEDS A12, paper", divides=True, counts=True),
    "count": NormaliserRow(_count, "n^(-sigmoid(p)) y", "SEEDS A04", counts=True, parameter="power"),
    "mean": NormaliserRow(_mean, "y / n", "SEEDS A23", counts=True),
    "feature": NormaliserRow(_plain, "sum_r q_r S[r] / z[r]", "SEEDS A06", divides=True, per_feature=True),
    "flow": NormaliserRow(_flow, "sigmoid(I^) y / Z", "SEEDS A07", divides=True, counts=True),
    "none": NormaliserRow(_plain, "y", "SEEDS K4"),
}
