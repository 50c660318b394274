"""Feature maps that ops 1 and 5 take inside their kernels (`feature_map=`): all of them exponentials of +-y under a normaliser over the features.

    phi_f(y) = exp(clamp(+-gain y_f - norm(y)))     norm: 0, log sum exp over one sign's features (each), over both signs' (joint)

So a kernel needs one function for all of them, and its gradient needs phi alone: with p = phi and s its gradient, the exponent's is
p (s - sum p s) under a normaliser, p s without one; y's is gain times that of its + feature less that of its - feature.

Key: Y numbers of a head before the map, F features of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 30.0  # of an exponent without a normaliser: a product of two features stays inside fp32
FLOOR = 1e-12  # LoLCATs' smallest feature


def hedgehog_exp(y: Tensor) -> Tensor:
    """[exp(y); exp(-y)] (the paper)."""
    y = y.clamp(-LIMIT, LIMIT)
    return torch.cat([y.exp(), (-y).exp()], -1)


def hedgehog_softmax2(y: Tensor) -> Tensor:
    """[softmax(y); softmax(-y)] (LoLCATs)."""
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(FLOOR)


def hedgehog_softmax(y: Tensor) -> Tensor:
    """One softmax over [2y, -2y] (flash-linear-attention)."""
    return torch.cat([2 * y, -2 * y], -1).softmax(-1)


def softmax(y: Tensor) -> Tensor:
    """Softmax over the features of one token."""
    return y.softmax(-1)


FREE, EACH, JOINT = 0, 1, 2


@dataclass(frozen=True)
class Exponential:
    """A row of `FUSED`. `plain` is its definition; the numbers say the same to a kernel."""

    plain: Callable[[Tensor], Tensor]
    signs: int  # 2: features of y, then of -y
    norm: int  # FREE, EACH, JOINT
    gain: float = 1.0
    limit: float = math.inf  # largest absolute exponent
    floor: float = 0.0  # smallest feature


FUSED = {
    "hedgehog_exp": Exponential(hedgehog_exp, 2, FREE, limit=LIMIT),
    "hedgehog_softmax2": Exponential(hedgehog_softmax2, 2, EACH, floor=FLOOR),
    "hedgehog_softmax": Exponential(hedgehog_softmax, 2, JOINT, gain=2.0),
    "softmax": Exponential(softmax, 1, EACH),
}


def signs(feature_map: str | None) -> int:
    """Features per number of the head."""
    return 1 if feature_map is None else FUSED[feature_map].signs


def mapped(feature_map: str | None, *given: Tensor) -> tuple[Tensor, ...]:
    """phi of each, fp32 at least; as they are without a map."""
    if feature_map is None:
        return given
    return tuple(FUSED[feature_map].plain(x if x.dtype == torch.float64 else x.float()) for x in given)
