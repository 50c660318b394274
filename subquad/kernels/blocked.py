"""Backend `torch`: the ops in blocks and chunks out of torch's own operations, statistics and states in fp32. Runs on every device.

Key: as in ops.py; R = H / G, C block size, Y slots that a block sees.
"""

import torch
from torch import Tensor

from subquad.kernels import definition
from subquad.kernels.additive import additive_chunk
from subquad.kernels.banded import BLOCK, _blocks, banded_blocks
from subquad.kernels.delta import delta_chunk
from subquad.kernels.packing import sequences
from subquad.kernels.weights import band_weights


def additive(q, k, v, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, g = tensors
        o, state = additive_chunk(q.unflatten(2, (G, -1)), k, v, g, state)
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, log_decay], initial_state, cu_seqlens)
    return (o if scale == 1.0 else o * scale).to(out_dtype or v.dtype), state if output_final_state else None


def delta(q, k, v, beta, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, beta, g = tensors
        o, state = delta_chunk(q.unflatten(2, (G, -1)), k, v, beta, g, state)
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, beta, log_decay], initial_state, cu_seqlens)
    return (o if scale == 1.0 else o * scale).to(out_dtype or v.dtype), state if output_final_state else None


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(tensors, _):
        q, k, v, forget = tensors
        T, G = q.shape[1], k.shape[2]
        sink_k, sink_v, seen = _sinks(k, v, T, sinks, window, position, sink_k_BNGK, sink_v_BNGV)
        logit = None if sink_logit_H is None else sink_logit_H.view(G, -1)
        run = banded_blocks if weight == "softmax" else _weighted
        more = {} if weight == "softmax" else dict(weight=weight, forget=forget)
        found = run(q.unflatten(2, (G, -1)), k, v, window=window, scale=scale, sink_k=sink_k, sink_v=sink_v, sink_seen_BTN=seen, softcap=softcap,
                    sink_logit_GR=logit, **more)  # fmt: skip
        return tuple(x.flatten(2, 3) for x in found), None

    return sequences(one, [q, k, v, log_forget_BXG], None, cu_seqlens)[0]


def _sinks(k, v, T, sinks, window, position, sink_k, sink_v):
    """Keys and values of the sinks, and [B, T, N] which query sees which: those that have left its window."""
    if sink_k is None:
        if not sinks:
            return None, None, None
        sink_k, sink_v = k[:, :sinks], v[:, :sinks]
    t = torch.arange(T, device=k.device)[:, None] + position
    seen = t - torch.arange(sink_k.shape[1], device=k.device) >= window
    return sink_k, sink_v, seen.expand(k.shape[0], -1, -1)


def _weighted(q, k, v, *, window, scale, sink_k, sink_v, sink_seen_BTN, softcap, sink_logit_GR, weight, forget):
    """Any weight: sinks stand beside every block's keys, so that one row of scores holds all that a query sees."""
    B, T, G, R, _ = q.shape
    before, C = k.shape[1] - T, max(window, BLOCK)
    blocks = lambda k, v: _blocks(q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2), None, before, window, C)  # noqa: E731
    qb, kb, vb, mask = blocks(k, v)  # [B, G, R, n, C, K], [B, G, n, Y, K | V], [1, 1, 1, n, C, Y]
    n, Y = kb.shape[2], kb.shape[3]
    scores = (qb @ kb.unsqueeze(2).transpose(-1, -2)).float() * scale
    seen = mask.expand(B, -1, -1, -1, -1, -1)
    N = 0 if sink_k is None else sink_k.shape[1]
    if N:
        sk, sv = (x.transpose(1, 2).unsqueeze(2).expand(-1, -1, n, -1, -1) for x in (sink_k, sink_v))
        scores = torch.cat([(qb @ sk.unsqueeze(2).transpose(-1, -2)).float() * scale, scores], -1)
        vb = torch.cat([sv, vb], 3)
        rows = torch.nn.functional.pad(sink_seen_BTN, (0, 0, 0, n * C - T)).unflatten(1, (n, C))
        seen = torch.cat([rows[:, None, None], seen], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if forget is not None:
        c = forget.float().cumsum(1)[..., None]  # [B, X, G, 1]
        at_query, _, at_key, _ = _blocks(c[:, before:, :, None].permute(0, 2, 3, 1, 4), c.transpose(1, 2), c.transpose(1, 2), None, before, window, C)
        at_key = at_key.squeeze(-1)[:, :, None, :, None]  # [B, G, 1, n, 1, Y]
        if N:
            first = c[:, :N] if sink_k.data_ptr() == k.data_ptr() else torch.zeros_like(c[:, :1]).expand(-1, N, -1, -1)
            at_key = torch.cat([first.squeeze(-1).transpose(1, 2)[:, :, None, None, None].expand(-1, -1, 1, n, 1, N), at_key], -1)
        scores = scores + (at_query - at_key)
    w, denominator, top = band_weights(weight, scores, seen, window, sink_logit_GR)
    numerator = (w.to(vb.dtype) @ vb.unsqueeze(2)).float()
    cut = lambda x: x.flatten(3, 4)[:, :, :, :T].movedim(3, 1)  # noqa: E731
    return cut(numerator), cut(denominator), cut(top)


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None,
):  # fmt: skip
    def one(tensors, state):
        q, k, v, fq, fk, mix, g = tensors
        T, before, own = q.shape[1], k.shape[1] - q.shape[1], 0 if sink_k_BNGK is None else sink_k_BNGK.shape[1]
        numerator, denominator, top = banded(q, k, v, window=window, sinks=sinks, scale=scale, position=position, sink_k_BNGK=sink_k_BNGK,
                                             sink_v_BNGV=sink_v_BNGV)  # fmt: skip
        x = torch.arange(T, device=q.device) - window  # row t of `left` is the token that leaves the window when query t arrives
        some = position + x >= (own or sinks)
        left, enters = (x + before).clamp_min(0), (some & (x >= -before))[None, :, None, None]
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        y, state = additive(fq, fk[:, left] * enters, values[:, left], g, initial_state=state, output_final_state=True, out_dtype=torch.float32)
        # A branch without tokens must not set the maximum.
        mix = mix.float().masked_fill(~some[None, :, None], float("-inf"))
        high = torch.maximum(top, mix).detach()
        a, b = (top - high).exp(), (mix - high).exp()
        total = (a * denominator + b * y[..., -1]).clamp_min(torch.finfo(torch.float32).tiny)
        return ((a[..., None] * numerator + b[..., None] * y[..., :-1]) / total[..., None],), state

    (o,), state = sequences(one, [q, k, v, fq, fk, mix, log_decay], initial_state, cu_seqlens)
    return o.to(v.dtype), state if output_final_state else None


def _fp32(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.float() for x in tensors]


def additive_step(q, k, v, state, log_decay=None, *, scale=1.0):
    q, k, v, g = _fp32(q, k, v, log_decay)
    if g is not None:
        state.mul_(g.exp().view(*g.shape, *(1,) * (4 - g.dim())))
    state.add_(k[..., None] * v[:, :, None])
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2) * scale


def delta_step(q, k, v, beta, state, log_decay=None, *, scale=1.0):
    q, k, v, beta, g = _fp32(q, k, v, beta, log_decay)
    if g is not None:
        state.mul_(g.exp()[..., None, None])
    wrong = v - (k[:, :, None] @ state)[:, :, 0]
    state.add_(k[..., None] * (beta[..., None] * wrong)[:, :, None])
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2) * scale


def window_linear_step(
    q, k, v, fq=None, mix=None, state=None, left_fk=None, left_v=None, log_decay=None, *, scale=None, sink_k_BNGK=None, sink_v_BNGV=None
):
    q, k, v, fq, mix, left_fk, left_v, log_decay, sk, sv = _fp32(q, k, v, fq, mix, left_fk, left_v, log_decay, sink_k_BNGK, sink_v_BNGV)
    return definition.window_linear_step(q, k, v, fq, mix, state, left_fk, left_v, log_decay, scale=scale, sink_k_BNGK=sk, sink_v_BNGV=sv)
