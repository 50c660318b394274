"""Writes: how a key and value enter the state (SEEDS 3.2 K3), and how strongly. One row each.

    additive    S <- S + k v^T                     delta   S <- S + beta k (v - S^T k)^T, beta = sigmoid(W x)
    step        S <- S + dt k v^T                  convex  S <- S + (1 - a) v^T, the complement of the decay in the place of the key
    dual        S <- S + (g^tau * k) v^T           momentum    S <- a S + P, P <- eta P + beta k (v - S^T k)^T, eta = sigmoid(W x)
    selective   S_fv <- exp(-dt_v A_fv) S_fv + dt_v k_f v_v, dt a number per value channel: its own decay

Key: as in decays.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WriteRow:
    about: str
    source: str
    decays: tuple[str, ...] | None = None  # the decays it goes with; None: any
    corrects: bool = False  # what the state already says about a key is taken off: keys must be of unit length


WRITES = {
    "additive": WriteRow("k v^T", "SEEDS K3"),
    "delta": WriteRow("beta k (v - S^T k)^T", "SEEDS B01", ("none", "scalar", "own_scalar"), corrects=True),
    "momentum": WriteRow("P, P <- eta P + beta k (v - S^T k)^T", "SEEDS B15", ("own_scalar",), corrects=True),
    "selective": WriteRow("dt_v k_f v_v", "SEEDS B03", ("none",)),
    "step": WriteRow("dt k v^T", "SEEDS B03", ("step_size",)),
    "convex": WriteRow("(1 - a) v^T", "SEEDS Dependencies, HGRN2", ("key",)),
    "dual": WriteRow("(g^tau * k) v^T", "SEEDS B07", ("dual",)),
}


def complement(log_decay: Tensor) -> Tensor:
    """1 - a of a log decay, exact for decays near 1."""
    return -torch.expm1(log_decay)


def strength(write: str, gate, hidden_BTD: Tensor) -> Tensor | None:
    """[B, T, G, 1 | F]: what a token's own gates multiply its key with; None when the key is written as it is."""
    if write == "step":
        return gate.step(hidden_BTD).unsqueeze(-1)
    if write == "dual":
        g, tau = gate.parts(hidden_BTD)
        return g**tau
    return None
