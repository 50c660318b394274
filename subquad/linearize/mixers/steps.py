"""Recurrences that have no chunkwise form here and go token by token (SEEDS 3.5): momentum (B15) and element-wise decay (B03, Mamba-1).

Rows without a token (on False) leave their state alone. Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F features,
V value size.
"""

import torch
from torch import Tensor


def momentum_steps(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, eta: Tensor, log_decay: Tensor, on: Tensor, state: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P <- eta P + beta k (v - S^T k)^T,  S <- a S + P,  y = S^T q (Titans, linear memory): (y [B, T, G, R, V], S, P [B, G, F, V]).

    The gradient is taken at the memory of the token before; q [B, T, G, R, F], k [B, T, G, F], beta, eta, log_decay [B, T, G]; fp32.
    """
    out, decay, keep = [], log_decay.exp(), on[:, :, None, None, None]
    for t in range(q.shape[1]):
        wrong = v[:, t] - torch.einsum("bgf,bgfv->bgv", k[:, t], state)
        push = k[:, t, :, :, None] * (beta[:, t, :, None] * wrong)[:, :, None]
        momentum = torch.where(keep[:, t], eta[:, t, :, None, None] * momentum + push, momentum)
        state = torch.where(keep[:, t], decay[:, t, :, None, None] * state + momentum, state)
        out.append(torch.einsum("bgrf,bgfv->bgrv", q[:, t], state))
    return torch.stack(out, 1), state, momentum


def selective_steps(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, on: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_fv <- exp(-dt_v a_fv) S_fv + dt_v k_f v_v,  y = S^T q (Mamba-1): (y [B, T, G, R, V], S [B, G, F, V]). dt [B, T, G, V], a [G, F, V] > 0."""
    out, keep = [], on[:, :, None, None, None]
    for t in range(q.shape[1]):
        fade = torch.exp(-dt[:, t, :, None] * a)
        state = torch.where(keep[:, t], fade * state + k[:, t, :, :, None] * (dt[:, t] * v[:, t])[:, :, None], state)
        out.append(torch.einsum("bgrf,bgfv->bgrv", q[:, t], state))
    return torch.stack(out, 1), state
