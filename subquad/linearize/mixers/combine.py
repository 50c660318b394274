"""Combinations of the window's exact attention with the linear branch (SEEDS 3.2 K9). One row each, g and s learned:

    joint       (sum_near e^s v + e^mu y) / (sum_near e^s + e^mu Z)          one normaliser, stabilised by the common maximum (SEEDS 0.2, exact form)
    joint_top   the same with e^(m - f) for e^mu, m the window's largest score, f learned per query head (SEEDS 0.2, LoLCATs form)
    logits      the same with e^mu = 1: the linear branch has logits of its own (slots, codewords)
    gated       (1 - g) window + g linear, g = sigmoid(W x)
    added       window + s linear, s = sigmoid(W x)
    alone       linear over all tokens; no window, no sinks

As long as no token has left the window, the output is the window's. Key: B batch, T tokens, G key/value heads, R query heads per key/value head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.linearize.mixers.local import Local

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CombineRow:
    about: str
    source: str
    joint: bool = False  # needs a sum of positive weights on the linear side
    gate: str = ""  # token: a gate of the layer input; head: a number per query head
    window: bool = True


COMBINES = {
    "joint": CombineRow("one normaliser, share from the layer input", "SEEDS 0.2, C02, G02", joint=True, gate="token"),
    "joint_top": CombineRow("one normaliser, the window's maximum on its own side only", "SEEDS 0.2, G02", joint=True, gate="head"),
    "logits": CombineRow("one softmax over the window's and the branch's logits", "SEEDS C03, A19", joint=True),
    "gated": CombineRow("(1 - g) window + g linear", "SEEDS B15, D07", gate="token"),
    "added": CombineRow("window + s linear", "SEEDS C01", gate="token"),
    "alone": CombineRow("linear only", "SEEDS 3.1", window=False),
}


def some_older(left_BT: Tensor) -> Tensor:
    """[B, T, 1, 1] fp32: 0 as long as nothing has left the window, so that all of the output is the window's."""
    return left_BT[..., None, None].float()


def join(local: Local, left_BT: Tensor, numerator: Tensor, denominator: Tensor, log_share: Tensor) -> Tensor:
    """One normaliser over the window's sums and e^log_share times the branch's; all fp32."""
    # A branch without tokens must not set the maximum: the window's sums would underflow under it, or the product with its empty sums overflow.
    log_share = log_share.masked_fill(~left_BT[..., None, None], float("-inf"))
    top = torch.maximum(local.top, log_share).detach()
    a, b = (local.top - top).exp(), (log_share - top).exp()
    total = a * local.denominator + b * denominator
    return (a.unsqueeze(-1) * local.numerator + b.unsqueeze(-1) * numerator) / total.clamp_min(TINY).unsqueeze(-1)
