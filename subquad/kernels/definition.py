"""Backend `definition`: every op as its equation, in the dtype of its inputs (fp64 for the oracle of the tests). Slow; O(T^2) or a loop over tokens.

Key: as in ops.py; R = H / G.
"""

import torch
from torch import Tensor

from subquad.kernels.additive import additive_definition
from subquad.kernels.banded import banded_definition
from subquad.kernels.delta import delta_definition
from subquad.kernels.features import mapped
from subquad.kernels.packing import linear, sequences


def additive(q, k, v, log_decay=None, *, feature_map=None, **more):
    return linear(additive_definition, *mapped(feature_map, q, k), v, [log_decay], **more)


def delta(q, k, v, beta, log_decay=None, **more):
    return linear(delta_definition, q, k, v, [beta, log_decay], **more)


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


def _with_sinks(k, v, sink_k, sink_v):
    """Given sinks and slots in one row, and how many sinks were given."""
    return (k, v, 0) if sink_k is None else (torch.cat([sink_k, k], 1), torch.cat([sink_v, v], 1), sink_k.shape[1])


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None, normalise=False,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(tensors, _):
        q, k, v, forget = tensors
        T, G, before, bias = q.shape[1], k.shape[2], k.shape[1] - q.shape[1], None
        keys, values, own = _with_sinks(k, v, sink_k_BNGK, sink_v_BNGV)
        near, _ = near_and_older(T, before, window, own or sinks, position, own, q.device)
        if forget is not None:
            c = forget.cumsum(1).transpose(1, 2)  # [B, G, X]
            at_key = torch.cat([torch.zeros_like(c[..., :1]).expand(-1, -1, own), c], -1) if own else c
            bias = c[:, :, before:, None] - at_key[:, :, None]
        logit = None if sink_logit_H is None else sink_logit_H.view(G, -1)
        found = banded_definition(q.unflatten(2, (G, -1)), keys, values, near[None], scale=scale, window=window, weight=weight, softcap=softcap,
                                  bias_BGTJ=bias, sink_logit_GR=logit, normalise=normalise)  # fmt: skip
        return tuple(x.flatten(2, 3) for x in found), None

    return sequences(one, [q, k, v, log_forget_BXG], None, cu_seqlens)[0]


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None, feature_map=None,
):  # fmt: skip
    fq, fk = mapped(feature_map, fq, fk)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    G = k.shape[2]

    def one(tensors, state):
        q, k, v, fq, fk, mix, g = tensors
        T, before = q.shape[1], k.shape[1] - q.shape[1]
        q, fq, mix = (x.unflatten(2, (G, -1)) for x in (q, fq, mix))
        keys, values, own = _with_sinks(k, v, sink_k_BNGK, sink_v_BNGV)
        near, older = near_and_older(T, before, window, own or sinks, position, own, q.device)
        numerator, denominator, top = banded_definition(q, keys, values, near[None], scale=scale)
        # Slot x leaves at query x + window and fades by the decays after that one. What left before query 0 stands in the state already.
        leaves = torch.arange(-before, T, device=q.device) + window
        older = (older[:, own:] & (leaves >= 0))[None, :, :, None, None]
        g = fk.new_zeros(1, 1, 1) if g is None else g
        c = (g.unsqueeze(-1) if g.dim() == 3 else g).expand(fk.shape[0], T, -1, -1).cumsum(1)  # [B, T, 1 | G, 1 | F]
        fade = (c[:, :, None] - c[:, None, leaves.clamp(0, T - 1)]).masked_fill(~older, float("-inf")).exp()  # [B, T, X, 1 | G, 1 | F]
        ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        if fade.shape[-1] == 1:
            weights = torch.einsum("btgrf,bxgf->btxgr", fq, fk) * fade
        else:
            weights = torch.einsum("btgrf,btxgf->btxgr", fq, fk[:, None] * fade)
        y = torch.einsum("btxgr,bxgv->btgrv", weights, ones)
        last = torch.einsum("bxgf,bxgv->bgfv", fk * fade[:, -1], ones)
        if state is not None:
            y = y + torch.einsum("btgrf,bgfv->btgrv", fq * c.exp().unsqueeze(3), state)
            last = last + c[:, -1].exp().unsqueeze(-1) * state
        some = position + torch.arange(T, device=q.device) - window >= (own or sinks)  # a branch without tokens must not set the maximum
        mix = mix.to(y.dtype).masked_fill(~some[None, :, None, None], float("-inf"))
        high = torch.maximum(top, mix).detach()
        a, b = (top - high).exp(), (mix - high).exp()
        o = (a[..., None] * numerator + b[..., None] * y[..., :-1]) / (a * denominator + b * y[..., -1])[..., None]
        return (o.flatten(2, 3),), last

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
    keys, values, _ = _with_sinks(k, v, sink_k_BNGK, sink_v_BNGV)
    all_ = torch.ones(1, 1, keys.shape[1], dtype=torch.bool, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    numerator, denominator, top = (
        x[:, 0] for x in banded_definition(q.unflatten(1, (G, -1)).unsqueeze(1), keys, values, all_, scale=scale)
    )
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
