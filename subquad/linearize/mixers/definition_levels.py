"""Levels, pair by pair: the weight of the level at which a query holds a token, and what each token's own write has become. The oracle of levels.py
and delta_levels.py.

Key: as in definition.py; J tokens that are read, L levels.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.levels import level_of


def level_weights(mixer, call: AttentionCall) -> Tensor:
    """[B, T, J, G, R]: lambda_t at the level of j; only j that are written by t mean something. Written tokens are counted from 0."""
    T = call.q_BTGRK.shape[1]
    lag, first = (mixer.window, mixer.sinks) if mixer.rows.combine.older else (0, 0)
    lambdas, level, rows = mixer.levels(call.hidden_BTD), level_of(T), []
    for t in range(T):
        span = max(t - lag - first + 1, 0)  # tokens written
        own = lambdas[:, t][..., level[max(span - 1, 0), :span]].movedim(-1, 1)  # [B, span, G, R]
        rows.append(torch.cat([own.new_ones(len(own), first, *own.shape[2:]), own, own.new_ones(len(own), T, *own.shape[2:])], 1)[:, :T])
    return torch.stack(rows, 1)


def delta_levels(mixer, call: AttentionCall, q: Tensor, k: Tensor, beta: Tensor, a: Tensor, new: Tensor) -> Tensor:
    """sum_j lambda_tj q_t.W_j, W_j = w_j v_j^T: w_j is beta_j k_j turned by every token after j. new [B, G, T, J]: the token that is written at t."""
    out, lambdas = [], level_weights(mixer, call)
    writes = torch.zeros_like(k.transpose(1, 2))  # [B, G, J, F]: w_j, 0 before j is written
    for t in range(q.shape[1]):
        at = new[:, :, t]
        k_t, b_t = torch.einsum("bgj,bjgf->bgf", at, k), torch.einsum("bgj,bjg->bg", at, beta)
        fade = a[:, t] if mixer.rows.decay.clock == "now" else torch.einsum("bgj,bjg->bg", at, a)
        writes = writes * fade[..., None, None].exp()
        push = at - torch.einsum("bgf,bgjf->bgj", k_t, writes)
        writes = writes + push[..., None] * (b_t[..., None] * k_t)[:, :, None]
        read = torch.einsum("bgrf,bgjf->bjgr", q[:, t], writes)
        out.append(torch.einsum("bjgr,bjgv->bgrv", lambdas[:, t] * read, call.v_BTGV))
    return torch.stack(out, 1)
