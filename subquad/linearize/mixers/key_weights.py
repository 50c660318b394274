"""Key weights: a number per token that scales its key or value before it is written (SEEDS 3.2 K5). One class and one row each.

so_far: fixed when the token arrives; depends on all tokens so far through running sums of its own (`parts`), kept beside the state. Gives what
stays with the token, by name. of_all: the two-sided form, for encoders, from every real token of the row: the weight, and I^ where there is one.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K key size, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-6
NOTHING = -1e30  # the log of no weight at all; finite, so that gradients are


def running(x_BT: Tensor, before: Tensor) -> Tensor:
    """before + x_1 + .. + x_t for every t: [B, T, ...]."""
    return before.unsqueeze(1) + x_BT.cumsum(1)


class Competition:
    """RALA (SEEDS A11): alpha_j = n softmax_j(mean_i phi(q_i) . k_j / sqrt(K)), the mean over tokens and the group's queries; n tokens, so that
    equal logits give 1. Causal: i <= j, and the softmax weight of j among the tokens so far."""

    @staticmethod
    def parts(G: int, F: int) -> dict[str, tuple]:
        return {"q_sum": (G, F), "log_sum": (G,), "count": ()}

    @staticmethod
    def so_far(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        count = running(real_BT, parts["count"])
        q = running(q_BTGRF.mean(3) * real_BT[..., None, None], parts["q_sum"])
        mean = q / count.clamp_min(1)[..., None, None]
        logit = (mean * k_raw_BTGK).sum(-1) / k_raw_BTGK.shape[-1] ** 0.5
        weight, parts["log_sum"] = share_so_far(logit, real_BT, parts["log_sum"], parts["count"])
        parts["q_sum"], parts["count"] = q[:, -1], count[:, -1]
        return {"weight": (weight * count[..., None]).unsqueeze(-1)}

    @staticmethod
    def of_all(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor) -> dict[str, Tensor]:
        n = real_BT.sum(1).clamp_min(1)[:, None, None]
        mean = (q_BTGRF.mean(3) * real_BT[..., None, None]).sum(1) / n
        logit = torch.einsum("bgk,btgk->btg", mean, k_raw_BTGK) / k_raw_BTGK.shape[-1] ** 0.5
        return {"weight": (share_of_all(logit, real_BT) * n).unsqueeze(-1)}


class Flow:
    """Flow-Attention (SEEDS A07); sums over all tokens, or over the tokens so far:

        I_i = phi(q_i).sum_j phi(k_j)          O_j = phi(k_j).sum_i phi(q_i), the group's queries averaged
        O^_j = clamp(phi(k_j).sum_i phi(q_i) i / I_i / j, -1, 1)          c_j = j e^(O^_j) / sum_l e^(O^_l)

    with I and O in mean form (divided by the position). Kept with a token: c_j, and 1 / O_j for the query side's I^_i (normalisers.py).
    """

    @staticmethod
    def parts(G: int, F: int) -> dict[str, tuple]:
        return {"q_sum": (G, F), "k_sum": (G, F), "flow_sum": (G, F), "log_sum": (G,), "count": ()}

    @staticmethod
    def so_far(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        real, count = real_BT[..., None, None], running(real_BT, parts["count"])
        n = count.clamp_min(1)[..., None, None]
        k_sum, q_sum = running(k_BTGF * real, parts["k_sum"]), running(q_BTGRF.mean(3) * real, parts["q_sum"])
        incoming = (q_BTGRF * (k_sum / n).unsqueeze(3)).sum(-1, keepdim=True)
        outgoing = (k_BTGF * q_sum / n).sum(-1, keepdim=True)
        flow = running((q_BTGRF / incoming.clamp_min(TINY)).mean(3) * real, parts["flow_sum"])
        competing = (k_BTGF * flow / n).sum(-1).clamp(-1, 1)
        weight, parts["log_sum"] = share_so_far(competing, real_BT, parts["log_sum"], parts["count"])
        for name, x in (("k_sum", k_sum), ("q_sum", q_sum), ("flow_sum", flow), ("count", count)):
            parts[name] = x[:, -1]
        return {"weight": (weight * count[..., None]).unsqueeze(-1), "outgoing": 1 / outgoing.clamp_min(TINY)}

    @staticmethod
    def of_all(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor) -> dict[str, Tensor]:
        real, n = real_BT[..., None, None], real_BT.sum(1).clamp_min(1)[:, None, None]
        k_BTGF = k_BTGF * real
        q_mean, k_mean = (q_BTGRF.mean(3) * real).sum(1) / n, k_BTGF.sum(1) / n
        incoming = torch.einsum("btgrf,bgf->btgr", q_BTGRF, k_mean).clamp_min(TINY)
        outgoing = torch.einsum("btgf,bgf->btg", k_BTGF, q_mean).clamp_min(TINY)
        flow = ((q_BTGRF / incoming.unsqueeze(-1)).mean(3) * real).sum(1) / n
        competing = torch.einsum("btgf,bgf->btg", k_BTGF, flow).clamp(-1, 1)
        allocation = torch.einsum("btgrf,bgf->btgr", q_BTGRF, (k_BTGF / outgoing.unsqueeze(-1)).sum(1) / n)
        return {"weight": (share_of_all(competing, real_BT) * n).unsqueeze(-1), "allocation": allocation}


def share_so_far(logit_BTG: Tensor, real_BT: Tensor, before_BG: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    """(e^logit_t / sum_(s<=t) e^logit_s, the new log sum [B, G]); `before` counts for rows that have seen tokens (count > 0)."""
    logit = logit_BTG.masked_fill(~real_BT.bool()[..., None], NOTHING)
    start = torch.where(count_B[:, None] == 0, NOTHING, before_BG)
    total = torch.logcumsumexp(torch.cat([start.unsqueeze(1), logit], 1), 1)[:, 1:]
    share = (logit_BTG - total).clamp_max(0.0).exp()
    return share * real_BT[..., None], total[:, -1]


def share_of_all(logit_BTG: Tensor, real_BT: Tensor) -> Tensor:
    return logit_BTG.masked_fill(~real_BT.bool()[..., None], NOTHING).softmax(1)


@dataclass(frozen=True)
class KeyWeightRow:
    about: str
    source: str
    rule: type | None = None
    on: str = "key"  # what the weight multiplies: key, or value
    kept: tuple[str, ...] = ()  # numbers per key/value head that stay with a token
    column: str = ""  # which of them is read as a column beside the values, for the query side's I^ (normalisers.py)


KEY_WEIGHTS = {
    "none": KeyWeightRow("every token the same", "SEEDS K5"),
    "competition": KeyWeightRow("n softmax_j(mean phi(q) . k_j / sqrt(K))", "SEEDS A11", Competition, kept=("weight",)),
    "flow": KeyWeightRow("n softmax_j(outgoing flow)", "SEEDS A07", Flow, on="value", kept=("weight", "outgoing"), column="outgoing"),
}
