"""From scores to weights: what can stand in the place of the softmax when all keys are kept. One function and one row each.

Every function takes scores s [B, G, R, T, X] (fp32, NOTHING where a query must not look) and gives weights of the same size, 0 there. n is the
number of keys a query sees. Learned numbers stand per query head in [G, R].

Key: B batch, T queries, X keys, G key/value heads, R query heads per key/value head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.linearize.mixers.key_weights import NOTHING

STEPS = 40  # of bisection: 2^-40 of the starting interval, below fp32
REFERENCE = 1024  # tokens at which scalable softmax starts as the teacher


@dataclass(frozen=True)
class Seen:
    """mask [B, 1, 1, T, X]: what each query sees; n [B, 1, 1, T, 1] fp32, at least 1; p: the mixer's number per query head, [G, R, 1, 1], or None."""

    mask: Tensor
    n: Tensor
    p: Tensor | None


@dataclass(frozen=True)
class WeightRow:
    fn: Callable[[Tensor, Seen], Tensor]
    about: str
    source: str
    start: float | None = None  # of the number per query head; None: there is none
    exact: float | None = None  # that number's value with which the mixer is the teacher
    always: bool = False  # it is the teacher
    fades: bool = False  # keys whose scores are far below a row's largest can be left out


def softmax(s: Tensor, seen: Seen) -> Tensor:
    return s.softmax(-1) * seen.mask


def _threshold(z: Tensor, power: Tensor | float, mask: Tensor) -> Tensor:
    """tau with sum relu(z - tau)^power = 1, by bisection; its gradient is that of the implicit function (one Newton step that changes nothing)."""
    with torch.no_grad():
        top = z.amax(-1, keepdim=True)
        low, high = top - 1, top.clone()
        for _ in range(STEPS):
            middle = (low + high) / 2
            enough = ((z - middle).relu() ** power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    gap = (z - low).relu()
    total = (gap**power).sum(-1, keepdim=True)
    slope = torch.where(gap > 0, power * gap.clamp_min(1e-12) ** (power - 1), 0.0).sum(-1, keepdim=True).detach()
    return low + (total - total.detach()) / slope.clamp_min(1e-12)


def _entmax(s: Tensor, alpha: Tensor | float, mask: Tensor) -> Tensor:
    """alpha-entmax: relu((alpha - 1) s - tau)^(1 / (alpha - 1))."""
    z = (s - s.detach().amax(-1, keepdim=True)).clamp_min(-1e6) * (alpha - 1)
    power = 1 / (alpha - 1)
    return (z - _threshold(z, power, mask)).relu() ** power * mask


def entmax15(s: Tensor, seen: Seen) -> Tensor:
    return _entmax(s, 1.5, seen.mask)


def sparsemax(s: Tensor, seen: Seen) -> Tensor:
    return _entmax(s, 2.0, seen.mask)


def entmax(s: Tensor, seen: Seen) -> Tensor:
    """alpha = 1.02 + 0.98 sigmoid(p), learned per head; at 1.02 powers of 50 are the nearest to softmax that fp32 holds."""
    return _entmax(s, 1.02 + 0.98 * torch.sigmoid(seen.p), seen.mask)


def sigmoid(s: Tensor, seen: Seen) -> Tensor:
    """sigmoid(s - ln n + p)."""
    return torch.sigmoid(s - seen.n.log() + seen.p) * seen.mask


def relu(s: Tensor, seen: Seen) -> Tensor:
    """ReLU(s) / n."""
    return s.relu() / seen.n * seen.mask


def softpick(s: Tensor, seen: Seen) -> Tensor:
    """ReLU(e^s - 1) / (sum |e^s - 1| + 1e-8), with the largest of s and 0 taken out of every exponent first."""
    top = s.detach().amax(-1, keepdim=True).clamp_min(0)
    lifted = ((s - top).exp() - (-top).exp()) * seen.mask
    return lifted.relu() / (lifted.abs().sum(-1, keepdim=True) + 1e-8)


def scalable(s: Tensor, seen: Seen) -> Tensor:
    """softmax(p ln n s)."""
    return (s * (seen.p * seen.n.clamp_min(2).log())).masked_fill(~seen.mask, NOTHING).softmax(-1) * seen.mask


def self_adjusted(s: Tensor, seen: Seen) -> Tensor:
    """softmax(s) (s - min(s_min, 0)) / (max(s_max, 0) - min(s_min, 0))."""
    high = s.amax(-1, keepdim=True).clamp_min(0)
    low = s.masked_fill(~seen.mask, -NOTHING).amin(-1, keepdim=True).clamp_max(0)
    return softmax(s, seen) * (s.clamp_min(-1e6) - low) / (high - low).clamp_min(1e-6)


def power(s: Tensor, seen: Seen) -> Tensor:
    """s^2 / sum s^2, divided by the largest |s| first."""
    kept = s.masked_fill(~seen.mask, 0.0)
    squares = (kept / kept.detach().abs().amax(-1, keepdim=True).clamp_min(1e-12)).square()
    return squares / squares.sum(-1, keepdim=True).clamp_min(1e-12)


def softmax1(s: Tensor, seen: Seen) -> Tensor:
    """e^s / (e^p + sum e^s)."""
    top = torch.maximum(s.detach().amax(-1, keepdim=True), seen.p.detach())
    lifted = (s - top).exp() * seen.mask
    return lifted / (lifted.sum(-1, keepdim=True) + (seen.p - top).exp())


def clipped(s: Tensor, seen: Seen) -> Tensor:
    """clip((1 + a / n) softmax(s) - a / n, 0, 1), a = p."""
    low = seen.p / seen.n
    return ((1 + low) * softmax(s, seen) - low).clamp(0, 1) * seen.mask


WEIGHTS = {
    "softmax": WeightRow(softmax, "softmax in blocks of queries", "SEEDS J01", always=True, fades=True),
    "entmax15": WeightRow(entmax15, "1.5-entmax", "SEEDS D01"),
    "entmax": WeightRow(entmax, "alpha-entmax, alpha learned per head", "SEEDS D02", start=-3.0),
    "sparsemax": WeightRow(sparsemax, "sparsemax", "SEEDS D03"),
    "sigmoid": WeightRow(sigmoid, "sigmoid(s - ln n + p)", "SEEDS E01", start=0.0),
    "relu": WeightRow(relu, "ReLU(s) / n", "SEEDS E02"),
    "softpick": WeightRow(softpick, "ReLU(e^s - 1) / sum |e^s - 1|", "SEEDS E04"),
    "scalable": WeightRow(scalable, "softmax(p ln n s)", "SEEDS E05", start=1 / math.log(REFERENCE)),
    "self_adjusted": WeightRow(self_adjusted, "softmax(s) times s, shifted and scaled to 0..1", "SEEDS E06"),
    "power": WeightRow(power, "s^2 / sum s^2", "SEEDS E08"),
    "softmax1": WeightRow(softmax1, "e^s / (e^p + sum e^s)", "SEEDS E14", start=-10.0, exact=-40.0, fades=True),
    "clipped": WeightRow(clipped, "clip((1 + p/n) softmax(s) - p/n, 0, 1)", "SEEDS E15", start=0.0, exact=0.0),
}


def weight_clashes(name: str, p: dict[str, Any]) -> list[str]:
    """Sentences about pieces of preset `name` (class full) that do not go together."""
    weights, near = p.get("weights", "softmax"), p.get("near", False)
    if not p.get("blocks") or (weights == "softmax" and not near):
        return []
    return [f"mixer {name!r}: options.blocks chooses blocks of all tokens for a softmax: it goes with weights softmax and near false, not {weights}, {near}."]
