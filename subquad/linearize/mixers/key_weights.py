"""Key weights: a number per token that scales its key before it is written, fixed when the token arrives (SEEDS 3.2 K5).

They depend on all tokens so far through running sums (or running softmax sums) of their own, kept beside the state.
Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F features.
"""

import torch
from torch import Tensor

TINY = 1e-6
NOTHING = -1e30  # the log of no weight at all; finite, so that gradients are


def running(x_BT: Tensor, before: Tensor) -> Tensor:
    """before + x_1 + .. + x_t for every t: [B, T, ...]."""
    return before.unsqueeze(1) + x_BT.cumsum(1)


class Competition:
    """RALA (SEEDS A11), causal: alpha_j = j softmax_(l <= j)(mean_(i <= j) phi(q_i) . k_j / sqrt(K)), the mean over tokens and the group's queries.

    The softmax weight of j among the tokens so far, fixed at j; times j, so that equal logits give 1.
    """

    @staticmethod
    def parts(G: int, F: int) -> dict[str, tuple]:
        return {"q_sum": (G, F), "log_sum": (G,), "count": ()}

    @staticmethod
    def weigh(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        count = running(real_BT, parts["count"])
        q = running(q_BTGRF.mean(3) * real_BT[..., None, None], parts["q_sum"])
        mean = q / count.clamp_min(1)[..., None, None]
        logit = (mean * k_raw_BTGK).sum(-1) / k_raw_BTGK.shape[-1] ** 0.5
        weight, parts["log_sum"] = share_so_far(logit, real_BT, parts["log_sum"], parts["count"])
        parts["q_sum"], parts["count"] = q[:, -1], count[:, -1]
        return {"weight": (weight * count[..., None]).unsqueeze(-1)}


class Flow:
    """Flow-Attention (SEEDS A07), causal: every sum of the two-sided formula is a sum over the tokens so far.

        I_i = phi(q_i).sum_(j<=i) phi(k_j)          O_j = phi(k_j).sum_(i<=j) phi(q_i), the group's queries averaged
        O^_j = clamp(phi(k_j).sum_(i<=j) phi(q_i) i / I_i / j, -1, 1)          c_j = j e^(O^_j) / sum_(l<=j) e^(O^_l)

    with I and O in mean form (divided by the position). Kept with a token: c_j, and 1 / O_j for the query side's I^_i (normalisers.py).
    """

    @staticmethod
    def parts(G: int, F: int) -> dict[str, tuple]:
        return {"q_sum": (G, F), "k_sum": (G, F), "flow_sum": (G, F), "log_sum": (G,), "count": ()}

    @staticmethod
    def weigh(q_BTGRF: Tensor, k_BTGF: Tensor, k_raw_BTGK: Tensor, real_BT: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
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


def share_so_far(logit_BTG: Tensor, real_BT: Tensor, before_BG: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    """(e^logit_t / sum_(s<=t) e^logit_s, the new log sum [B, G]); `before` counts for rows that have seen tokens (count > 0)."""
    logit = logit_BTG.masked_fill(~real_BT.bool()[..., None], NOTHING)
    start = torch.where(count_B[:, None] == 0, NOTHING, before_BG)
    total = torch.logcumsumexp(torch.cat([start.unsqueeze(1), logit], 1), 1)[:, 1:]
    share = (logit_BTG - total).clamp_max(0.0).exp()
    return share * real_BT[..., None], total[:, -1]


KEY_WEIGHTS = {"none": None, "competition": Competition, "flow": Flow}
# What a key weight keeps with each token, in numbers per key/value head.
KEPT = {"none": {}, "competition": {"weight": 1}, "flow": {"weight": 1, "outgoing": 1}}
