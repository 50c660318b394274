"""Combinations of the window's exact attention with the linear branch (SEEDS 3.2 K9). One row each, g and s learned:

    joint       (sum_near e^s v + e^mu y) / (sum_near e^s + e^mu Z)          one normaliser, stabilised by the common maximum (SEEDS 0.2, exact form)
    joint_top   the same with e^(m - f) for e^mu, m the window's largest score, f learned per query head (SEEDS 0.2, LoLCATs form)
    logits      the same with e^mu = 1: the linear branch has logits of its own (slots, codewords)
    gated       (1 - g) window + g linear, g = sigmoid(W x)
    added       window + s linear, s = sigmoid(W x)
    sequential  window over v'_j = v_j + s_j linear_j, linear over all tokens up to j asked by the group's mean query, s = sigmoid(W x) per key/value head
    alone       linear over all tokens; no window, no sinks

As long as no token has left the window, the output is the window's; with sequential it is where s = 0.
Key: B batch, T tokens, G key/value heads, R query heads per key/value head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, HeadShape
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.local import Local

TINY = torch.finfo(torch.float32).tiny
LEAST = 1e-18  # of a divisor whose gates can make it vanish: the gradient has its square below, which has to stay inside fp32

# --- parameters of a combination: name in the cell -> what is built as (shape, mass) ----------------------------------------------------------


def token_gate(shape: HeadShape, mass: float) -> nn.Module:
    """A number per token and query head from the layer input; `mass` at the start."""
    return InputGate(shape.hidden, (shape.kv_heads, shape.groups), mass)


def head_factor(shape: HeadShape, mass: float) -> nn.Parameter:
    """A number per query head; sigmoid of it is a tenth at the start, as published."""
    return nn.Parameter(torch.full((shape.kv_heads, shape.groups), -2.197))


def value_gate(shape: HeadShape, mass: float) -> nn.Module:
    """A number per token and key/value head from the layer input; `mass` at the start."""
    return InputGate(shape.hidden, (shape.kv_heads,), mass)


COMBINE_GATES = {"mix": token_gate, "factor": head_factor, "enrich": value_gate}

# --- log weight of the linear branch under a joint normaliser: (cell, call, local, Z [B, T, G, R], log scale taken out of Z) -> [B, T, G, R] ----


def gate_share(cell, call: AttentionCall, local: Local, total_BTGR: Tensor, log_scale: Tensor | float) -> Tensor:
    return cell.mix(call.hidden_BTD)


def top_share(cell, call: AttentionCall, local: Local, total_BTGR: Tensor, log_scale: Tensor | float) -> Tensor:
    return local.top - nn.functional.logsigmoid(cell.factor.float())


def own_share(cell, call: AttentionCall, local: Local, total_BTGR: Tensor, log_scale: Tensor | float) -> Tensor:
    """The branch has logits of its own: nothing is added to them."""
    return torch.zeros_like(total_BTGR)


# --- the table ------------------------------------------------------------------------------------------------------------------------------


def added(window: Tensor, linear: Tensor, share: Tensor) -> Tensor:
    return window + share * linear


@dataclass(frozen=True)
class CombineRow:
    about: str
    source: str
    gate: str = ""  # a row of COMBINE_GATES
    share: Callable[..., Tensor] | None = None  # one normaliser for both: the branch's log weight under it
    mix: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # (window, linear, sigmoid of the gate) of two outputs
    adds: bool = False  # mix leaves the window's output as it is
    window: bool = True
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs
    first: bool = False  # the branch comes first, over all tokens: what it reads goes into the values that the window keeps

    @property
    def joint(self) -> bool:
        """Needs a sum of positive weights on the linear side."""
        return self.share is not None

    @property
    def older(self) -> bool:
        """The linear branch sees a token when it leaves the window, not when it comes."""
        return self.window and not self.first


COMBINES = {
    "joint": CombineRow("one normaliser, share from the layer input", "SEEDS 0.2, C02, G02", "mix", share=gate_share, takes=("mass",)),
    "joint_top": CombineRow("one normaliser, the window's maximum on its own side only", "SEEDS 0.2, G02", "factor", share=top_share),
    "logits": CombineRow("one softmax over the window's and the branch's logits", "SEEDS C03, A19", share=own_share),
    "gated": CombineRow("(1 - g) window + g linear", "SEEDS B15, D07", "mix", mix=torch.lerp, takes=("mass",)),
    "added": CombineRow("window + s linear", "SEEDS C01", "mix", mix=added, adds=True, takes=("mass",)),
    "sequential": CombineRow("window over v + s linear, linear over all tokens", "SEEDS K9, B07, B15", "enrich", first=True, takes=("mass",)),
    "alone": CombineRow("linear only", "SEEDS 3.1", window=False),
}


def asked_once(call: AttentionCall) -> AttentionCall:
    """The call with one query per key/value head, the mean of its group's."""
    q, plain = (None if x is None else x.float().mean(3, keepdim=True) for x in (call.q_BTGRK, call.plain_q_BTGRK))
    return replace(call, q_BTGRK=q, plain_q_BTGRK=plain)


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
    return (a.unsqueeze(-1) * local.numerator + b.unsqueeze(-1) * numerator) / total.clamp_min(LEAST).unsqueeze(-1)
