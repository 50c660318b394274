"""Score -> weight: what a band of scores becomes (op 3). One function per weight; sums as ops.banded states them.

Key: T queries, J keys.
"""

import math

import torch
from torch import Tensor

WEIGHTS = ("softmax", "softmax1", "softpick", "sigmoid", "forget", "entmax")
EPSILON = 1e-6  # softpick's, so that a row of zeros divides by something


def divisor(denominator: Tensor) -> Tensor:
    """[..., 1], never 0: where nothing is seen the numerator is 0 too."""
    return denominator.clamp_min(torch.finfo(denominator.dtype).tiny).unsqueeze(-1)


def band_weights(
    weight: str, scores: Tensor, seen: Tensor, window: int, sink_logit: Tensor | None, normalise: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`_weights`; normalise: weights divided by the denominator, which then has no gradient of its own."""
    w, denominator, top = _weights(weight, scores, seen, window, sink_logit)
    if normalise:
        w, denominator = w / divisor(denominator), denominator.detach()
    return w, denominator, top


def _weights(weight: str, scores: Tensor, seen: Tensor, window: int, sink_logit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """scores [..., T, J], seen bool (broadcasts) -> (weights like scores, denominator and maximum without J). A row that sees nothing: zeros.

    sink_logit broadcasts with the maximum.

    SEEDS C03 (forgetting), J01 (softmax1, learned sinks); softpick: Zuhri et al. 2025; sigmoid with bias -log n: Ramapuram et al. 2024;
    1.5-entmax: Peters et al. 2019, exact by sorting.
    """
    masked = scores.masked_fill(~seen, float("-inf"))
    zero = torch.zeros_like(scores[..., 0])
    if weight == "sigmoid":
        return torch.sigmoid(masked - math.log(window)), zero + 1, zero
    if weight == "entmax":
        return entmax(masked), zero + 1, zero
    top = masked.amax(-1)
    if sink_logit is not None:
        top = torch.maximum(top, sink_logit.to(top.dtype))
    if weight in ("softmax1", "softpick"):
        top = top.clamp_min(0.0)
    # The maximum cancels in every quotient; without gradient it changes nothing.
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    w = (masked - top[..., None]).exp()
    if weight == "softpick":
        shifted = (w - (-top).exp()[..., None]).masked_fill(~seen, 0.0)
        return shifted.relu(), shifted.abs().sum(-1) + EPSILON, top
    denominator = w.sum(-1)
    if weight == "softmax1":
        denominator = denominator + (-top).exp()
    if sink_logit is not None:
        denominator = denominator + (sink_logit.to(top.dtype) - top).exp()
    return w, denominator, top


def entmax(scores: Tensor) -> Tensor:
    """1.5-entmax over the last dimension: relu(s / 2 - tau)^2, tau such that they sum to 1. -inf entries get 0."""
    half = scores / 2
    half = half - half.amax(-1, keepdim=True).nan_to_num(neginf=0.0).detach()
    ordered = half.sort(-1, descending=True).values.nan_to_num(neginf=-1e4)  # far below any support, finite
    k = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    mean, square = ordered.cumsum(-1) / k, ordered.square().cumsum(-1) / k
    tau = mean - ((1 - k * (square - mean.square())) / k).clamp_min(0.0).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True).clamp_min(1)
    # Again from the support alone: the gradient of what lies outside it is zero, not that of the clamp.
    inside = k <= support
    n = support.to(scores.dtype)
    mean = torch.where(inside, ordered, 0.0).sum(-1, keepdim=True) / n
    spread = torch.where(inside, (ordered - mean).square(), 0.0).sum(-1, keepdim=True)
    tau = mean - ((1 - spread) / n).clamp_min(1e-30).sqrt()
    return torch.where(half == float("-inf"), 0.0, (half - tau).relu().square())
