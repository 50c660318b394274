"""Writes: how a key and value enter the state (SEEDS 3.2 K3), and how strongly. One row each.

    additive    S <- S + k v^T                     delta   S <- S + beta k (v - S^T k)^T, beta = sigmoid(W x)
    step        S <- S + dt k v^T                  convex  S <- S + (1 - a) v^T, the complement of the decay in the place of the key
    dual        S <- S + (g^tau * k) v^T           momentum    S <- a S + P, P <- eta P + beta k (v - S^T k)^T, eta = sigmoid(W x)
    selective   S_fv <- exp(-dt_v A_fv) S_fv + dt_v k_f v_v, dt a number per value channel: its own decay

Key: as in decays.py; V value size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.decays import SMALL_STEP
from subquad.linearize.mixers.gates import InputGate


@dataclass(frozen=True)
class WriteGate:
    """What a token is written with: fn(W x + b) of the token that is written: one number per key/value head, or one per value channel through a low rank."""

    fn: Callable[[Tensor], Tensor]
    bias: float = 0.0
    wide: bool = False

    def size(self, shape: HeadShape) -> int:
        return shape.value if self.wide else 1

    def make(self, shape: HeadShape, rank: int) -> InputGate:
        return InputGate(shape.hidden, (shape.kv_heads, self.size(shape)), self.bias, rank if self.wide else None)


# Name in the cell, and of the numbers that stay with a token until it is written.
WRITE_GATES = {
    "beta": WriteGate(torch.sigmoid),
    "eta": WriteGate(torch.sigmoid),
    "dt": WriteGate(F.softplus, SMALL_STEP, wide=True),
}


Start = Callable[[HeadShape, int], Tensor]  # (shape, features) -> start values


@dataclass(frozen=True)
class WriteRow:
    about: str
    source: str
    decays: tuple[str, ...] | None = None  # the decays it goes with; None: any
    read: str = "additive"  # a row of READS (reads.py)
    gates: tuple[str, ...] = ()  # rows of WRITE_GATES
    corrects: bool = False  # what the state already says about a key is taken off: keys must be of unit length
    strength: Callable[[nn.Module, Tensor], Tensor] | None = None  # (decay, hidden_BTD) -> [B, T, G, 1 | F] that multiplies the key
    complement: bool = False  # what is written stands in the place of the key's features: 1 - a
    bare: bool = False  # its read knows neither columns nor partitions nor exponents
    own: tuple[tuple[str, Start], ...] = ()  # parameters: their names in the cell, and their start
    more: tuple[str, ...] = ()  # further parts of memory of the state's size
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs


def complement(log_decay: Tensor) -> Tensor:
    """1 - a of a log decay, exact for decays near 1."""
    return -torch.expm1(log_decay)


def step_strength(decay: nn.Module, hidden_BTD: Tensor) -> Tensor:
    return decay.step(hidden_BTD).unsqueeze(-1)


def dual_strength(decay: nn.Module, hidden_BTD: Tensor) -> Tensor:
    return decay.strength(hidden_BTD)


def log_a(shape: HeadShape, features: int) -> Tensor:
    """ln A at the start, [G, F, V]: A = 1 .. F as in S4D-real, for every value channel."""
    return torch.arange(1, features + 1).float().log()[None, :, None].repeat(shape.kv_heads, 1, shape.value)


WRITES = {
    "additive": WriteRow("k v^T", "SEEDS K3"),
    "delta": WriteRow("beta k (v - S^T k)^T", "SEEDS B01", ("none", "scalar", "own_scalar"), read="delta", gates=("beta",), corrects=True),
    "momentum": WriteRow(
        "P, P <- eta P + beta k (v - S^T k)^T", "SEEDS B15", ("own_scalar",),
        read="momentum", gates=("beta", "eta"), corrects=True, more=("momentum",),
    ),
    "selective": WriteRow("dt_v k_f v_v", "SEEDS B03", ("none",), read="selective", gates=("dt",), bare=True, own=(("log_a", log_a),), takes=("rank",)),
    "step": WriteRow("dt k v^T", "SEEDS B03", ("step_size",), strength=step_strength),
    "convex": WriteRow("(1 - a) v^T", "SEEDS Dependencies, HGRN2", ("key",), complement=True),
    "dual": WriteRow("(g^tau * k) v^T", "SEEDS B07", ("dual",), strength=dual_strength),
}  # fmt: skip
