"""Backend `definition`: every op as its equation, in the dtype of its inputs (fp64 for the oracle of the tests). Slow; O(T^2) or a loop over tokens.

Key: as in ops.py; R = H / G.
"""

import torch
from torch import Tensor

from subquad.kernels.additive import additive_definition
from subquad.kernels.delta import delta_definition
from subquad.kernels.packing import sequences
from subquad.kernels.weights import band_weights


def additive(q, k, v, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, g = tensors
        o, state = additive_definition(q.unflatten(2, (G, -1)), k, v, g, state)
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, log_decay], initial_state, cu_seqlens)
    return (o * scale).to(out_dtype or v.dtype), state if output_final_state else None


def delta(q, k, v, beta, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, beta, g = tensors
        o, state = delta_definition(q.unflatten(2, (G, -1)), k, v, beta, g, state)
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, beta, log_decay], initial_state, cu_seqlens)
    return (o * scale).to(out_dtype or v.dtype), state if output_final_state else None


def near_and_older(T: int, before: int, window: int, sinks: int, position: int, own_sinks: int, device=None) -> tuple[Tensor, Tensor]:
    """[T, N + X] bool over given sinks and slots: what query t attends to, and what has left its window and is no sink."""
    t = torch.arange(T, device=device)[:, None]
    x = torch.arange(-before, T, device=device)[None]
    inside = (x <= t) & (x > t - window)
    left = x <= t - window
    sink = position + x < sinks
    near, older = inside | left & sink & (not own_sinks), left & ~sink
    if own_sinks:
        n = torch.arange(own_sinks, device=device)[None]
        near = torch.cat([position + t - n >= window, near], 1)
        older = torch.cat([torch.zeros_like(near[:, :own_sinks]), older], 1)
    return near, older


def _scores(q, keys, scale, softcap=None):
    """[B, G, R, T, J]"""
    s = torch.einsum("btgrk,bjgk->bgrtj", q.unflatten(2, (keys.shape[2], -1)), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None,
):  # fmt: skip
    def one(tensors, _):
        q, k, v, forget = tensors
        own = 0 if sink_k_BNGK is None else sink_k_BNGK.shape[1]
        T, before, G = q.shape[1], k.shape[1] - q.shape[1], k.shape[2]
        near, _ = near_and_older(T, before, window, own or sinks, position, own, q.device)
        keys, values = (k, v) if not own else (torch.cat([sink_k_BNGK, k], 1), torch.cat([sink_v_BNGV, v], 1))
        scores = _scores(q, keys, scale, softcap)
        if forget is not None:
            c = forget.cumsum(1).transpose(1, 2)  # [B, G, X]
            seen = torch.cat([torch.zeros_like(c[..., :1]).expand(-1, -1, own), c], -1) if own else c
            scores = scores + (c[:, :, None, before:, None] - seen[:, :, None, None, :])
        logit = None if sink_logit_H is None else sink_logit_H.view(G, -1)
        w, denominator, top = band_weights(weight, scores, near, window, logit)
        numerator = torch.einsum("bgrtj,bjgv->btgrv", w, values).flatten(2, 3)
        return (numerator, denominator.permute(0, 3, 1, 2).flatten(2), top.permute(0, 3, 1, 2).flatten(2)), None

    return sequences(one, [q, k, v, log_forget_BXG], None, cu_seqlens)[0]


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None,
):  # fmt: skip
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, fq, fk, mix, g = tensors
        own = 0 if sink_k_BNGK is None else sink_k_BNGK.shape[1]
        T, before = q.shape[1], k.shape[1] - q.shape[1]
        near, older = near_and_older(T, before, window, own or sinks, position, own, q.device)
        keys, values = (k, v) if not own else (torch.cat([sink_k_BNGK, k], 1), torch.cat([sink_v_BNGV, v], 1))
        w, denominator, top = band_weights("softmax", _scores(q, keys, scale), near, window, None)
        numerator = torch.einsum("bgrtj,bjgv->btgrv", w, values)
        denominator, top = denominator.permute(0, 3, 1, 2), top.permute(0, 3, 1, 2)
        # The linear half, one token at a time: row t of `left` is the token that leaves the window when query t arrives.
        x = torch.arange(T, device=q.device) - window
        enters = ((x >= -before) & (position + x >= (own or sinks)))[None, :, None, None]
        left = (x + before).clamp_min(0)
        ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        y, state = additive_definition(fq.unflatten(2, (G, -1)), fk[:, left] * enters, ones[:, left], g, state)
        mix = mix.unflatten(2, (G, -1)).to(y.dtype)
        some = (position + x >= (own or sinks))[None, :, None, None]
        high = torch.maximum(top, mix.masked_fill(~some, float("-inf"))).detach()
        a, b = (top - high).exp(), (mix.masked_fill(~some, float("-inf")) - high).exp()
        o = (a[..., None] * numerator + b[..., None] * y[..., :-1]) / (a * denominator + b * y[..., -1])[..., None]
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, fq, fk, mix, log_decay], initial_state, cu_seqlens)
    return o.to(v.dtype), state if output_final_state else None


def _step(fn, tensors, state, **kwargs):
    """A sequence op on one token, with the state updated in place."""
    o, new = fn(*(None if x is None else x.unsqueeze(1) for x in tensors), initial_state=state, output_final_state=True, **kwargs)
    state.copy_(new)
    return o[:, 0]


def additive_step(q, k, v, state, log_decay=None, *, scale=1.0):
    return _step(additive, (q, k, v, log_decay), state, scale=scale)


def delta_step(q, k, v, beta, state, log_decay=None, *, scale=1.0):
    return _step(delta, (q, k, v, beta, log_decay), state, scale=scale)


def window_linear_step(
    q, k, v, fq=None, mix=None, state=None, left_fk=None, left_v=None, log_decay=None, *, scale=None, sink_k_BNGK=None, sink_v_BNGV=None
):
    G = k.shape[2]
    keys, values = (k, v) if sink_k_BNGK is None else (torch.cat([sink_k_BNGK, k], 1), torch.cat([sink_v_BNGV, v], 1))
    scores = _scores(q.unsqueeze(1), keys, scale)[..., 0, :]  # [B, G, R, J]
    top = scores.amax(-1)
    w = (scores - top[..., None]).exp()
    numerator, denominator = torch.einsum("bgrj,bjgv->bgrv", w, values.to(w.dtype)), w.sum(-1)
    if state is None:
        return (numerator / denominator[..., None]).flatten(1, 2)
    if log_decay is not None:
        state.mul_(log_decay.exp().view(*log_decay.shape, *(1,) * (4 - log_decay.dim())))
    if left_fk is not None:
        state.add_(left_fk[..., None] * torch.cat([left_v, torch.ones_like(left_v[..., :1])], -1)[:, :, None])
    y = torch.einsum("bgrf,bgfv->bgrv", fq.unflatten(1, (G, -1)).to(state.dtype), state)
    mix = mix.unflatten(1, (G, -1))
    high = torch.maximum(top, mix)
    a, b = (top - high).exp(), (mix - high).exp()
    return ((a[..., None] * numerator + b[..., None] * y[..., :-1]) / (a * denominator + b * y[..., -1])[..., None]).flatten(1, 2)
