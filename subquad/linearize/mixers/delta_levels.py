"""Levels around the delta rule (log-linear Gated DeltaNet; levels.py, SEEDS B06).

    S^(l) <- a (I - beta k k^T) S^(l) on every level, S^(0) gets beta k v^T,   y_t = sum_l lambda_t^(l) q_t^T S_t^(l)

What a token wrote is turned by every token after it, so the weight of s for t is A_ts of A = (Q K^T * D)(I + tril(beta K K^T * D, -1))^-1 beta, times
lambda_t at the level at which t holds s. Inside a chunk A is written out. Beyond it a level's blocks pair up: the second block runs the delta rule
with nothing to write from the state of the first, which gives what its queries read there and that state at its end.

Key: as in levels.py; N chunks, C chunk size.
"""

import torch
from torch import Tensor

from subquad.kernels.additive import _chunks, wide
from subquad.kernels.ops import delta
from subquad.linearize.mixers.levels import DENSE, Places, level_of


def read_all_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None, weight: Tensor, before: int = 0) -> Tensor:
    """y [B, T, G, R, V] of tokens among themselves, `before` others come first; beta, log [B, T, G], weight [B, T, G, R, L]; O(T log T)."""
    places = Places(k.shape[1], before)
    q, k, v, beta, log, weight = places.fill(q, k, v, beta, torch.zeros_like(beta) if log is None else log, weight)
    block = min(DENSE, places.chunk)
    out, states = _inside(q, k, v, beta, log, weight, block)
    while block < places.size:
        second = [x.unflatten(1, (-1, 2, block))[:, :, 1] for x in (q, k, beta, log, weight)]  # [B, n, block, ..]
        y, states = _pairs(*second[:4], states)
        y = y * second[4][..., places.level(block)].unsqueeze(-1)
        out = out + torch.stack([torch.zeros_like(y), y], 2).flatten(1, 3)
        block *= 2
    return places.cut(out)


def _inside(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log: Tensor, weight: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """(y over the own chunk of every token, the state [B, N, G, F, V] that a chunk leaves when it starts from nothing)."""
    k, v, beta, c = _chunks(k, C), _chunks(v, C), _chunks(beta, C).unsqueeze(-1), _chunks(wide(log), C).cumsum(3)  # [B, G, N, C, ..]
    q, weight = _chunks(q, C).transpose(3, 4), _chunks(weight, C).transpose(3, 4)  # [B, G, N, R, C, F | L]
    causal = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()
    fade = (c.unsqueeze(-1) - c.unsqueeze(-2)).float().masked_fill(~causal, float("-inf")).exp()
    within = (beta * (k @ k.transpose(-1, -2)) * fade).tril(-1) + torch.eye(C, device=k.device)
    turned = torch.linalg.solve_triangular(within, torch.diag_embed(beta.squeeze(-1)), upper=False, unitriangular=True)
    scores = (q @ k.transpose(-1, -2).unsqueeze(3)) * fade.unsqueeze(3)
    level = level_of(C).to(k.device).masked_fill(~causal, 0).expand(*weight.shape[:4], C, C)
    y = (scores @ turned.unsqueeze(3) * weight.gather(-1, level)) @ v.unsqueeze(3)
    states = (k * (c[..., -1:] - c).float().exp().unsqueeze(-1)).transpose(-1, -2) @ (turned @ v)
    return y.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), states.transpose(1, 2)


def _pairs(q: Tensor, k: Tensor, beta: Tensor, log: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """(what second blocks read in the states of the first [B, n, block, G, R, V], the states of both together [B, n, G, F, V])."""
    first, second = states[:, 0::2], states[:, 1::2]
    shape = q.shape
    q, k, beta, log, start = (x.flatten(0, 1) for x in (q, k, beta, log, first))
    nothing = k.new_zeros(*k.shape[:3], states.shape[-1])
    y, end = delta(q.flatten(2, 3), k, nothing, beta, log, initial_state=start.contiguous(), output_final_state=True)
    return y.view(*shape[:-1], -1), end.unflatten(0, first.shape[:2]) + second
