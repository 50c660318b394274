"""Attention maps compared: KL, entropy, and whether weights follow logits (SEEDS I04, I07, I08). Tensors only.

Key: P heads, T queries, S keys. Row t of a map holds the weights of query t; places after t are 0.
"""

import torch
from torch import Tensor

TINY = 1e-9  # weight given to nothing, so that a logarithm exists: a key that a student never sees costs about 20 nats times its weight


def as_distribution(weights_PTS: Tensor) -> Tensor:
    """Non-negative rows that sum to 1. Delta rules make negative weights; they count as 0."""
    positive = weights_PTS.double().clamp_min(0)
    return positive / positive.sum(-1, keepdim=True).clamp_min(TINY)


def map_kl(teacher_PTS: Tensor, student_PTS: Tensor) -> Tensor:
    """KL(teacher || student) of every query in nats: fp64 [P, T]."""
    p, q = as_distribution(teacher_PTS), as_distribution(student_PTS)
    return (p * (p.clamp_min(TINY).log() - q.clamp_min(TINY).log())).sum(-1)


def entropy(weights_PTS: Tensor) -> Tensor:
    """Nats of every query: fp64 [P, T]. 0 is all weight on one key, log(keys) is uniform; low is spiky."""
    p = as_distribution(weights_PTS)
    return -(p * p.clamp_min(TINY).log()).sum(-1)


def monotonicity(logits_PTS: Tensor, weights_PTS: Tensor, first: int = 8) -> Tensor:
    """Spearman's rank correlation of a query's weights with the teacher's logits over the keys up to it, queries `first` and later: fp64
    [P, T - first]. 1: larger logits always get larger weights."""
    found = []
    for t in range(first, logits_PTS.shape[1]):
        a, b = (_ranks(x[:, t, : t + 1]) for x in (logits_PTS.double(), weights_PTS.double()))
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        found.append((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(TINY))
    return torch.stack(found, 1)


def _ranks(x_PS: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing their mean rank."""
    below = (x_PS.unsqueeze(-1) > x_PS.unsqueeze(-2)).sum(-1)
    upto = (x_PS.unsqueeze(-1) >= x_PS.unsqueeze(-2)).sum(-1)
    return (below + upto - 1).double() / 2
