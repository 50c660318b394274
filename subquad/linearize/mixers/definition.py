"""What every mixer computes, written as sums over pairs of tokens: the oracle of the tests. No state, no padding, no chunks, any dtype.

With W the window, N the sinks, s_tj = scale q_t.k_j (softcapped), near(t) = tokens t-W+1..t and the sinks 0..N-1, older(t) = N..t-W:

    window         o_t = sum_near e^s v / sum_near e^s
    window_linear  o_t = (sum_near e^s v + e^mu_t sum_older phi_q(q_t).phi_k(k_j) v_j) / (the same without v)
    gla            o_t = (1 - g_t) window + g_t sum_older w_tj v_j / sum_older w_tj,   w_tj = sum_r phi_q(q_t)_r phi_k(k_j)_r e^(a_(j+W+1)r + .. + a_tr)
    gated_delta    o_t = (1 - g_t) window + g_t c S_t^T q^_t,   S_t = e^a_t S_(t-1), then the delta rule with k^_j, v_j, beta_j for j = t-W

mu, g, a, beta are linear in the layer input. While older(t) is empty, o_t is the window's. Key: as in base.py.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.cell import Cell
from subquad.linearize.mixers.gates import log_decay


def definition(mixer: Mixer, call: AttentionCall) -> Tensor:
    """o [B, T, G, R, V] of a call without state or padding, in the dtype of q; O(T^2)."""
    T = call.q_BTGRK.shape[1]
    t, j = torch.arange(T)[:, None], torch.arange(T)[None]
    older = (j <= t - mixer.window) & (j >= mixer.sinks)
    near = (j <= t) & ~older
    scores = torch.einsum("btgrk,bjgk->bgrtj", call.q_BTGRK, call.k_BTGK) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.exp() * near
    total = weights.sum(-1, keepdim=True)
    if call.sink_logit_GR is not None:
        total = total + call.sink_logit_GR.exp()[None, :, :, None, None]
    window = _apply(weights / total, call.v_BTGV)
    if not isinstance(mixer, Cell):
        return window
    some = older.any(1)[None, :, None, None]
    mix = mixer.mix(call.hidden_BTD).to(window.dtype)
    if mixer.write == "delta":
        linear = _delta(mixer, call)
        share = torch.sigmoid(mix) * some
        return (1 - share)[..., None] * window + (share * mixer.read_scale)[..., None] * linear
    similar = _similarity(mixer, call) * older
    if mixer.combine == "joint":
        both = weights + mix.exp().permute(0, 2, 3, 1)[..., None] * similar
        return _apply(both / (both.sum(-1, keepdim=True) + total - weights.sum(-1, keepdim=True)), call.v_BTGV)
    linear = _apply(similar / similar.sum(-1, keepdim=True).clamp_min(1e-6), call.v_BTGV)
    share = (torch.sigmoid(mix) * some)[..., None]
    return (1 - share) * window + share * linear


def _apply(weights_BGRTJ: Tensor, v_BTGV: Tensor) -> Tensor:
    return torch.einsum("bgrtj,bjgv->btgrv", weights_BGRTJ, v_BTGV)


def _similarity(mixer: Cell, call: AttentionCall) -> Tensor:
    """[B, G, R, T, J]: phi_q(q_t).phi_k(k_j), faded by the decays between the step at which j is written and t."""
    q, k = mixer.map_q(call.q_BTGRK), mixer.map_k(call.k_BTGK)
    if mixer.decay is None:
        return torch.einsum("btgrf,bjgf->bgrtj", q, k)
    a = log_decay(mixer.decay(call.hidden_BTD))
    a = a[..., None].expand(*a.shape, k.shape[-1]) if a.dim() == 3 else a
    total = a.cumsum(1)
    T = total.shape[1]
    written = (torch.arange(T) + mixer.window).clamp_max(T - 1)
    fade = (total[:, :, None] - total[:, None, written]).clamp_max(0.0).exp()  # [B, T, J, G, F]; only pairs with j <= t - W count
    return torch.einsum("btgrf,bjgf,btjgf->bgrtj", q, k, fade)


def _delta(mixer: Cell, call: AttentionCall) -> Tensor:
    q, k = mixer.map_q(call.q_BTGRK), mixer.map_k(call.k_BTGK)
    beta = torch.sigmoid(mixer.beta(call.hidden_BTD)).squeeze(-1)
    a = torch.zeros_like(beta) if mixer.decay is None else log_decay(mixer.decay(call.hidden_BTD))
    B, T, G, R, feat = q.shape
    state = q.new_zeros(B, G, feat, call.v_BTGV.shape[-1])
    out = []
    for t in range(T):
        state = state * a[:, t, :, None, None].exp()
        j = t - mixer.window
        if j >= mixer.sinks:
            wrong = call.v_BTGV[:, j] - torch.einsum("bgf,bgfv->bgv", k[:, j], state)
            state = state + k[:, j, :, :, None] * (beta[:, j, :, None] * wrong)[:, :, None]
        out.append(torch.einsum("bgrf,bgfv->bgrv", q[:, t], state))
    return torch.stack(out, 1)
