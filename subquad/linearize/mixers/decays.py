"""Decays: how the state fades, as natural logs <= 0 in fp32 (SEEDS 3.2 K2). One class and one row each.

`clock` says which token a gate belongs to. now: the token that reads (the state fades by the latest token's gate). own: the token that is
written, so that the branch is the published recurrence over the tokens older than the window; such gates are kept with the window.

Key: B batch, T tokens, D model size, G key/value heads, K key size, F features of the state.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.additive import MIN_LOG_DECAY
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import DAMPING, InputGate, log_decay

SMALL_STEP = math.log(math.expm1(0.01))  # softplus of it is 0.01


@dataclass(frozen=True)
class DecayRow:
    about: str
    source: str
    module: type[nn.Module] | None  # built as module(shape, features, rank); forward(hidden_BTD) or, for reads = key, forward(k_BTGK)
    vector: bool = False  # one number per feature, not per head
    clock: str = "now"
    reads: str = "hidden"
    fits: bool = False  # has start_at(log decay [G]), for calibration.py
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs

    @property
    def kept(self) -> bool:
        """Its numbers stay with a token until it is written."""
        return self.module is not None and self.clock == "own" and self.reads == "hidden"


class Gate(InputGate):
    """log sigmoid(W x + b) / 16, one number per key/value head. b = 4: a half-life of about 600 tokens at the start."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__(shape.hidden, (shape.kv_heads,), 4.0)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return log_decay(super().forward(hidden_BTD))

    def start_at(self, log_G: Tensor) -> None:
        """Fade by log_G a token: log sigmoid(b) / 16 = log, so b = -log(e^(-16 log) - 1)."""
        self.bias.copy_(-torch.log(torch.expm1(-DAMPING * log_G)).repeat_interleave(self.bias.numel() // log_G.numel()))


class VectorGate(Gate):
    """The same with one number per feature, through a low rank."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        InputGate.__init__(self, shape.hidden, (shape.kv_heads, features), 4.0, rank)


class Fixed(nn.Module):
    """log gamma_h with gamma_h = 1 - 2^(-5 - h), the same for all tokens (retention). Heads fade from near to far."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__()
        self.register_buffer("log_G", self.logs(shape.kv_heads))

    @staticmethod
    def logs(heads: int) -> Tensor:
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float32, device="cpu")))

    def start_at(self, log_G: Tensor) -> None:
        if self.untouched():  # no gate tells a trained mixer from a new one
            self.log_G.copy_(log_G)

    def untouched(self) -> bool:
        """The decays are those it was built with."""
        return torch.equal(self.log_G, self.logs(self.log_G.numel()).to(self.log_G))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.log_G.float().expand(*hidden_BTD.shape[:2], -1)


class Slopes(Fixed):
    """log lambda_h = -8 (h + 1) / G, ALiBi's ladder of slopes 2^(-8 (h + 1) / G) (lightning attention)."""

    @staticmethod
    def logs(heads: int) -> Tensor:
        return -torch.exp2(-8.0 * (torch.arange(heads, dtype=torch.float32, device="cpu") + 1) / heads)


class StepSize(nn.Module):
    """-dt exp(A), dt = softplus(W x + b) (Mamba-2). The start fades by 0.01 to 0.1 a token, as published: dt from 0.001 to 0.1, A from 1 to 16,
    here A = 1 and b so that dt = 0.01. The same dt scales what is written (writes.py)."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__()
        self.dt = InputGate(shape.hidden, (shape.kv_heads,), SMALL_STEP)
        self.log_a = nn.Parameter(torch.zeros(shape.kv_heads))

    def step(self, hidden_BTD: Tensor) -> Tensor:
        return F.softplus(self.dt(hidden_BTD))

    def start_at(self, log_G: Tensor) -> None:
        """By A: dt stays, which scales what is written as well."""
        self.log_a.copy_(torch.log(-log_G / F.softplus(self.dt.bias.float())))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return -self.step(hidden_BTD) * self.log_a.float().exp()


class KeyGate(nn.Module):
    """a = l + (1 - l) sigmoid(-k), per key channel, with the lower bound l = 0.95: the teacher's keys are the gate's logits (HGRN2; there l grows
    with depth). What is written is 1 - a (writes.py)."""

    FLOOR = 0.95

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__()

    def forward(self, k_BTGK: Tensor) -> Tensor:
        return torch.log(self.FLOOR + (1 - self.FLOOR) * torch.sigmoid(-k_BTGK.float()))


class PooledKey(nn.Module):
    """log sigmoid(k) / 16 per key channel (Liger: the pooled keys are the gates, no new weights; one key/value head pools onto itself)."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__()

    def forward(self, k_BTGK: Tensor) -> Tensor:
        return F.logsigmoid(k_BTGK.float()) / DAMPING


class DualGate(nn.Module):
    """-g tau with g = softplus(W_g x + b), tau = sigmoid(W_tau x), per feature (Rodimus). g^tau is what is written (writes.py)."""

    def __init__(self, shape: HeadShape, features: int, rank: int):
        super().__init__()
        self.g = InputGate(shape.hidden, (shape.kv_heads, features), SMALL_STEP, rank)
        self.tau = InputGate(shape.hidden, (shape.kv_heads, features), 0.0, rank)

    def parts(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(self.g(hidden_BTD)), torch.sigmoid(self.tau(hidden_BTD))

    def strength(self, hidden_BTD: Tensor) -> Tensor:
        """g^tau as exp(tau log g): where fp32 has no such g, log g is W x. (In 60 steps of training W x came to -77; at -104 g is 0, and the gradient NaN.)"""
        x, tau = self.g(hidden_BTD), torch.sigmoid(self.tau(hidden_BTD))
        log_g = torch.where(x < -15, x, F.softplus(x.clamp_min(-15.0)).log())  # they differ by e^-15 / 2 there
        return (tau * log_g).exp()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        g, tau = self.parts(hidden_BTD)
        return (-g * tau).clamp_min(MIN_LOG_DECAY)  # what op 1 can hold in one step; the paper has no such floor


DECAYS = {
    "none": DecayRow("nothing fades", "SEEDS K2", None),
    "scalar": DecayRow("log sigmoid(W x) / 16 per key/value head", "SEEDS B01, B10, C01", Gate, fits=True),
    "vector": DecayRow("log sigmoid(W x) / 16 per feature", "SEEDS K2, GLA", VectorGate, vector=True, fits=True, takes=("rank",)),
    "own_scalar": DecayRow("the same as scalar, of the token that is written", "SEEDS B01", Gate, clock="own", fits=True),
    "own_vector": DecayRow(
        "the same as vector, of the token that is written", "SEEDS GLA", VectorGate, vector=True, clock="own", fits=True, takes=("rank",)
    ),
    "fixed": DecayRow("1 - 2^(-5 - h)", "SEEDS Dependencies, RetNet; B13, G01", Fixed, fits=True),
    "slopes": DecayRow("exp(-2^(-8 h / G))", "SEEDS B04", Slopes, fits=True),
    "step_size": DecayRow("exp(-dt A)", "SEEDS B03", StepSize, clock="own", fits=True),
    "key": DecayRow("l + (1 - l) sigmoid(-k)", "SEEDS Dependencies, HGRN2", KeyGate, vector=True, clock="own", reads="key"),
    "pooled_key": DecayRow("sigmoid(k)^(1/16)", "SEEDS Dependencies, Liger", PooledKey, vector=True, clock="own", reads="key"),
    "dual": DecayRow("exp(-g tau)", "SEEDS B07", DualGate, vector=True, clock="own", takes=("rank",)),
}
