"""Positions of queries and keys (SEEDS 3.2 K6). One row each.

    keep      q and k as the teacher gives them, rotated where it rotates
    drop      before the teacher's rotation: gates or slots carry the order (the window stays rotated)
    selective pairs of features turned by phases Phi_t = Phi_(t-1) + omega_t, omega = W x + b from the layer input (Selective RoPE)
    phase     [x cos Phi; x sin Phi] with a phase per feature: the imaginary part of a complex decay (GateLoop)

Key: B batch, T tokens, D model size, G key/value heads, F features.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import InputGate


@dataclass(frozen=True)
class PositionRow:
    about: str
    source: str
    plain: bool = False  # wants q and k before the teacher's rotation
    phases: int = 0  # 2: a phase per pair of features; 1: a phase per feature
    doubles: bool = False  # features become twice as many
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs


POSITIONS = {
    "keep": PositionRow("as the teacher gives them", "SEEDS K6"),
    "drop": PositionRow("before the teacher's rotation", "SEEDS K6, C01", plain=True),
    "selective": PositionRow("pairs of features turned by phases from the layer input", "SEEDS B11", plain=True, phases=2, takes=("rank",)),
    "phase": PositionRow("complex decay: a phase per feature", "SEEDS B09", plain=True, phases=1, doubles=True, takes=("rank",)),
}


class Phases(nn.Module):
    """Phi_t, a running sum of W x + b per key/value head, within half a turn: [B, T, G, P]. b is a ladder of rotary frequencies (selective) or 0 (phase).

    Summed in fp64 and whole turns taken off: in fp32 the states of one call and of 500 steps were 2e-4 apart.
    """

    def __init__(self, shape: HeadShape, count: int, rank: int, ladder: bool):
        super().__init__()
        self.turn = InputGate(shape.hidden, (shape.kv_heads, count), 0.0, rank)
        if ladder:
            with torch.no_grad():
                self.turn.bias.copy_((5e5 ** -(torch.arange(count, dtype=torch.float32) / count)).repeat(shape.kv_heads))

    def forward(self, hidden_BTD: Tensor, real_BT: Tensor, before_BGP: Tensor) -> Tensor:
        turns = (self.turn(hidden_BTD) * real_BT[..., None, None]).double().cumsum(1) + before_BGP.unsqueeze(1)
        return (turns - (turns.detach() / math.tau).round() * math.tau).to(before_BGP.dtype)


def turned(features: Tensor, phase: Tensor, doubles: bool) -> Tensor:
    """Features [.., F] under phases that broadcast to [.., F / 2] (pairs: first and second half) or [.., F]."""
    cos, sin = phase.cos(), phase.sin()
    if doubles:
        return torch.cat([features * cos, features * sin], -1)
    one, two = features.chunk(2, -1)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)
