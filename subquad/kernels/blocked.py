"""Backend `torch`: the ops in blocks and chunks out of torch's own operations, statistics and states in fp32. Runs on every device.

Key: as in ops.py; R = H / G.
"""

import torch
from torch import Tensor

from subquad.kernels.additive import additive_chunk
from subquad.kernels.banded import banded_blocks
from subquad.kernels.definition import window_linear_step as step_definition
from subquad.kernels.delta import delta_chunk
from subquad.kernels.features import mapped
from subquad.kernels.packing import linear, sequences


def additive(q, k, v, log_decay=None, *, feature_map=None, **more):
    return linear(additive_chunk, *mapped(feature_map, q, k), v, [log_decay], **more)


def delta(q, k, v, beta, log_decay=None, **more):
    return linear(delta_chunk, q, k, v, [beta, log_decay], **more)


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None, normalise=False,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def one(tensors, _):
        q, k, v, forget = tensors
        T, G = q.shape[1], k.shape[2]
        given = {"fade_BXG": None if forget is None else forget.float().cumsum(1)}
        if sink_k_BNGK is not None or sinks:
            given |= _sinks(k, v, given["fade_BXG"], sinks, sink_k_BNGK, sink_v_BNGV)
            t = torch.arange(T, device=k.device)[:, None] + position
            seen = t - torch.arange(given["sink_k"].shape[1], device=k.device) >= window  # those that have left the query's window
            given["sink_seen_BTN"] = seen.expand(k.shape[0], -1, -1)
        logit = None if sink_logit_H is None else sink_logit_H.view(G, -1)
        found = banded_blocks(
            q.unflatten(2, (G, -1)), k, v, window=window, scale=scale, weight=weight, softcap=softcap, sink_logit_GR=logit,
            normalise=normalise, **given
        )
        return tuple(x.flatten(2, 3) for x in found), None

    return sequences(one, [q, k, v, log_forget_BXG], None, cu_seqlens)[0]


def _sinks(k, v, fade, sinks, own_k, own_v) -> dict[str, Tensor | None]:
    """The first tokens, or sinks given by themselves: those stand before slot 0, where nothing has been forgotten."""
    if own_k is None:
        return {"sink_k": k[:, :sinks], "sink_v": v[:, :sinks], "sink_fade_BNG": None if fade is None else fade[:, :sinks]}
    nothing = None if fade is None else fade.new_zeros(fade.shape[0], own_k.shape[1], fade.shape[2])
    return {"sink_k": own_k, "sink_v": own_v, "sink_fade_BNG": nothing}


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None, feature_map=None,
):  # fmt: skip
    fq, fk = mapped(feature_map, fq, fk)
    def one(tensors, state):
        q, k, v, fq, fk, mix, g = tensors
        T, before, own = q.shape[1], k.shape[1] - q.shape[1], 0 if sink_k_BNGK is None else sink_k_BNGK.shape[1]
        numerator, denominator, top = banded(q, k, v, window=window, sinks=sinks, scale=scale, position=position, sink_k_BNGK=sink_k_BNGK,
                                             sink_v_BNGV=sink_v_BNGV)  # fmt: skip
        x = torch.arange(T, device=q.device) - window  # row t of `left` is the token that leaves the window when query t arrives
        some = position + x >= (own or sinks)
        left, enters = (x + before).clamp_min(0), (some & (x >= -before))[None, :, None, None]
        values = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
        y, state = additive(
            fq, fk[:, left] * enters, values[:, left], g, initial_state=state, output_final_state=True, out_dtype=torch.float32
        )
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
    return step_definition(q, k, v, fq, mix, state, left_fk, left_v, log_decay, scale=scale, sink_k_BNGK=sk, sink_v_BNGV=sv)
