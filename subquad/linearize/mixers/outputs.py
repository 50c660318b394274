"""Outputs: what follows the read (SEEDS 3.2 K8), per query head. One class and one row each.

Norms start with weight 1 and gates at 1, so that what they add is off at the start. `size` is the parameter [G, R, ..], if any, that multiplies
the output. Key: B batch, T tokens, D model size, G key/value heads,
R query heads per key/value head, V value size.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import InputGate

SILU_ONE = 1.2784645  # SiLU of it is 1


class Scaled(nn.Module):
    """y times one learned number per query head, 1 at the start: un-normalised reads have a size of their own."""

    def __init__(self, shape: HeadShape, rank: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape.kv_heads, shape.groups, 1))

    def forward(self, y: Tensor, hidden_BTD: Tensor) -> Tensor:
        return y * self.scale.float()

    @property
    def size(self) -> nn.Parameter:
        return self.scale


class Norm(nn.Module):
    """RMS norm over V with a weight per query head and channel (group norm without mean or bias)."""

    def __init__(self, shape: HeadShape, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.kv_heads, shape.groups, shape.value))

    def forward(self, y: Tensor, hidden_BTD: Tensor) -> Tensor:
        return F.rms_norm(y, y.shape[-1:], eps=1e-5) * self.weight.float()

    @property
    def size(self) -> nn.Parameter:
        return self.weight


class NormGate(Norm):
    """RMS norm times SiLU(W x + b), W of low rank, SiLU(b) = 1."""

    def __init__(self, shape: HeadShape, rank: int):
        super().__init__(shape, rank)
        self.gate = InputGate(shape.hidden, (shape.kv_heads, shape.groups, shape.value), SILU_ONE, rank)

    def forward(self, y: Tensor, hidden_BTD: Tensor) -> Tensor:
        return super().forward(y, hidden_BTD) * F.silu(self.gate(hidden_BTD))


class GateNorm(NormGate):
    """RMS norm of y times SiLU(W x + b): the gate turns the read, and has no size of its own."""

    def forward(self, y: Tensor, hidden_BTD: Tensor) -> Tensor:
        return Norm.forward(self, y * F.silu(self.gate(hidden_BTD)), hidden_BTD)


class Gated(nn.Module):
    """y times (W x + b), W of low rank, b = 1."""

    size = None  # b is no factor of W x

    def __init__(self, shape: HeadShape, rank: int):
        super().__init__()
        self.gate = InputGate(shape.hidden, (shape.kv_heads, shape.groups, shape.value), 1.0, rank)

    def forward(self, y: Tensor, hidden_BTD: Tensor) -> Tensor:
        return y * self.gate(hidden_BTD)


@dataclass(frozen=True)
class OutputRow:
    about: str
    source: str
    module: type[nn.Module] | None
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs


OUTPUTS = {
    "none": OutputRow("the read as it is", "SEEDS K8", None),
    "scaled": OutputRow("times a number per query head", "SEEDS K8", Scaled),
    "norm": OutputRow("RMS norm per head", "SEEDS K8, B01, G01", Norm),
    "norm_gate": OutputRow("RMS norm times SiLU(W x)", "SEEDS K8, GLA, RetNet, B04", NormGate, takes=("rank",)),
    "gate_norm": OutputRow("times SiLU(W x), then RMS norm", "SEEDS K8, B07, C07", GateNorm, takes=("rank",)),
    "gate": OutputRow("times W x", "SEEDS K8, A11, A12", Gated, takes=("rank",)),
}
