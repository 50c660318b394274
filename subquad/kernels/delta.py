"""Op 2: causal linear attention with the (gated) delta rule.

    S'  = exp(g_t) * S_{t-1}                               decay first (SEEDS 0.10)
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T               k of unit length, beta in [0, 1]
    o_t = S_t^T q_t

SEEDS B01 (gated variant), 3.1. Chunkwise WY form: inside a chunk the corrected values U solve the unit lower triangular system
(I + A) U = beta (V - K~ S) with A_ij = beta_i exp(c_i - c_j) k_i.k_j for j < i, then O = Q~ S + (Q K^T * D) U.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F key size, V value size, N chunks, C chunk size.
"""

import torch
from torch import Tensor

from subquad.kernels.additive import _chunks, wide

CHUNK = 64


def delta_definition(
    q_BTGRF: Tensor,
    k_BTGF: Tensor,
    v_BTGV: Tensor,
    beta_BTG: Tensor,
    log_decay_BTG: Tensor | None = None,
    initial_state: Tensor | None = None,
):
    """The equations above, one token at a time, in the dtype of q. Returns (o [B, T, G, R, V], state [B, G, F, V])."""
    B, T, G, R, feat = q_BTGRF.shape
    state = q_BTGRF.new_zeros(B, G, feat, v_BTGV.shape[-1]) if initial_state is None else initial_state.to(q_BTGRF.dtype)
    out = []
    for t in range(T):
        if log_decay_BTG is not None:
            state = state * log_decay_BTG[:, t, :, None, None].to(state.dtype).exp()
        k, v, beta = k_BTGF[:, t], v_BTGV[:, t], beta_BTG[:, t, :, None]
        read = torch.einsum("bgf,bgfv->bgv", k, state)
        state = state + k[..., None] * (beta * (v - read))[..., None, :]
        out.append(torch.einsum("bgrf,bgfv->bgrv", q_BTGRF[:, t], state))
    return torch.stack(out, 1), state


def delta_chunk(
    q_BTGRF: Tensor,
    k_BTGF: Tensor,
    v_BTGV: Tensor,
    beta_BTG: Tensor,
    log_decay_BTG: Tensor | None = None,
    initial_state: Tensor | None = None,
):
    """Chunkwise form: same arguments and results as `delta_definition`, computed in fp32.

    Padding is exact: a token with beta 0 and log decay 0 leaves the state alone.
    """
    B, T, G, R, feat = q_BTGRF.shape
    C = min(CHUNK, max(T, 1))
    q = _chunks(q_BTGRF.float(), C).transpose(3, 4)  # [B, G, N, R, C, F]
    k, v = _chunks(k_BTGF.float(), C), _chunks(v_BTGV.float(), C)
    beta = _chunks(beta_BTG.float(), C).unsqueeze(-1)  # [B, G, N, C, 1]
    state = k.new_zeros(B, G, feat, v.shape[-1]) if initial_state is None else initial_state.float()
    causal = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()
    if log_decay_BTG is None:
        c = k.new_zeros(k.shape[:-1])
    else:
        c = _chunks(wide(log_decay_BTG), C).cumsum(3)  # [B, G, N, C]; fp64: see additive.py
    decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).float().masked_fill(~causal, float("-inf")).exp()  # [B, G, N, C, C]
    left = (c[..., -1:] - c).float().exp().unsqueeze(-1)
    c = c.float()

    within = (beta * (k @ k.transpose(-1, -2)) * decay).tril(-1)
    # One solve gives both right-hand sides: U = solved_v - solved_k S.
    right = torch.cat([beta * v, beta * k * c.exp().unsqueeze(-1)], -1)
    solved = torch.linalg.solve_triangular(within + torch.eye(C, device=k.device), right, upper=False, unitriangular=True)
    solved_v, solved_k = solved.split([v.shape[-1], feat], -1)
    weights = (q @ k.transpose(-1, -2).unsqueeze(3)) * decay.unsqueeze(3)
    read = q * c.exp().unsqueeze(3).unsqueeze(-1)
    write = k * left
    fade = c[..., -1].exp()[..., None, None]
    out = []
    for n in range(k.shape[2]):
        u = solved_v[:, :, n] - solved_k[:, :, n] @ state  # [B, G, C, V]
        out.append(weights[:, :, n] @ u.unsqueeze(2) + read[:, :, n] @ state.unsqueeze(2))
        state = state * fade[:, :, n] + write[:, :, n].transpose(-1, -2) @ u
    return torch.stack(out, 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, :T], state
