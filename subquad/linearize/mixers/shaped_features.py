"""Feature maps with a few parameters of their own. Key: as in feature_maps.py."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.products import pairs, second_order


class Cosine(nn.Module):
    """[ReLU(x) cos a; ReLU(x) sin a], a = pi position / (2 horizon): weights ReLU(q).ReLU(k) cos(pi distance / (2 horizon)) (SEEDS A02).

    Distances beyond the horizon get negative weight: it is fixed at conversion and must be at least the longest text.
    """

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, horizon: int = 8192, **options):
        super().__init__()
        self.scale, self.horizon = scale, horizon

    @classmethod
    def width(cls, size: int, **options) -> int:
        return 2 * size

    def forward(self, x: Tensor, position_BT: Tensor) -> Tensor:
        angle = position_BT.float() * (math.pi / (2 * self.horizon))
        angle = angle.view(*angle.shape, *(1,) * (x.dim() - 2))
        x = (x.float() * self.scale).relu()
        return torch.cat([x * angle.cos(), x * angle.sin()], -1)


class LogNormal(nn.Module):
    """log phi(x) = alpha x with one alpha per head (SEEDS A15). alpha is set by moment matching on calibration data, or learned from 1."""

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, **options):
        super().__init__()
        self.scale = scale
        self.alpha = nn.Parameter(torch.ones(*heads, 1))

    @classmethod
    def width(cls, size: int, **options) -> int:
        return size

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        return self.alpha.float() * (x.float() * self.scale)

    def untouched(self) -> bool:
        return bool((self.alpha == 1).all())

    def sharpen(self, by: Tensor) -> None:
        self.alpha.mul_(by.unsqueeze(-1))


class Focused(nn.Module):
    """u = (ReLU(x) + 1e-6) / softplus(s); phi = |u| u^3 / |u^3| with s learned per channel (SEEDS A08).

    Lengths are taken per head; the published code takes them over all heads together, before it splits them.
    """

    POWER = 3

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, **options):
        super().__init__()
        self.scale = scale
        self.spread = nn.Parameter(torch.zeros(*heads, size))

    @classmethod
    def width(cls, size: int, **options) -> int:
        return size

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        u = ((x.float() * self.scale).relu() + 1e-6) / F.softplus(self.spread.float())
        length = u.norm(dim=-1, keepdim=True)
        u = (u / length) ** self.POWER  # of unit length first: cubes of raw numbers leave fp32
        return length * u / u.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class Taylor(nn.Module):
    """1 + s + s^2 / 2 with s = tau q^.k^ (unit length) and tau learned per query head, 1 at the start (SEEDS A05)."""

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, **options):
        super().__init__()
        self.tau = nn.Parameter(torch.ones(*heads, 1)) if side == "q" else None

    @classmethod
    def width(cls, size: int, **options) -> int:
        return 1 + size + pairs(size)

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        y = F.normalize(x.float(), dim=-1)
        return second_order(y if self.tau is None else self.tau.float() * y)


class Normed(nn.Module):
    """Keys: layer norm over the head with affine parameters; queries unchanged (Galerkin attention, SEEDS A23)."""

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, **options):
        super().__init__()
        self.side = side
        if side == "k":
            self.weight = nn.Parameter(torch.ones(*heads, size))
            self.bias = nn.Parameter(torch.zeros(*heads, size))

    @classmethod
    def width(cls, size: int, **options) -> int:
        return size

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        x = x.float()
        if self.side == "q":
            return x
        return F.layer_norm(x, x.shape[-1:]) * self.weight.float() + self.bias.float()


class Polynomial(nn.Module):
    """A learned map of degree 2, kept positive: phi(x) = softplus(A x) + (B x)^2, A and B the identity at the start (SEEDS C02)."""

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, **options):
        super().__init__()
        self.scale, self.letters = scale, "gr"[: len(heads)]
        self.linear = nn.Parameter(torch.eye(size).repeat(*heads, 1, 1))
        self.square = nn.Parameter(torch.eye(size).repeat(*heads, 1, 1))

    @classmethod
    def width(cls, size: int, **options) -> int:
        return size

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        x, rule = x.float() * self.scale, f"bt{self.letters}k,{self.letters}kf->bt{self.letters}f"
        return F.softplus(torch.einsum(rule, x, self.linear.float())) + torch.einsum(rule, x, self.square.float()).square()
