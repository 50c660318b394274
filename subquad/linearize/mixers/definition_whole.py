"""What the mixers of encoders compute, where every token reads every token: sums over all pairs. The oracle of the tests.

Key: as in definition.py; M agents.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.cell import Cell
from subquad.linearize.mixers.definition import _apply, _features, _normalised
from subquad.linearize.mixers.whole import Agent, RelativeFavor


def whole_definition(mixer: Mixer, call: AttentionCall) -> Tensor:
    """o [B, T, G, R, V] of a call without padding; O(T^2)."""
    return {Cell: _cell, Agent: _agent, RelativeFavor: _relative}[type(mixer)](mixer, call)


def _cell(mixer: Cell, call: AttentionCall) -> Tensor:
    q, k = _features(mixer, call)
    T, all_ = q.shape[1], torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    if mixer.pieces["normaliser"] == "feature":
        k = k / k.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    w = torch.einsum("btgrf,bjgf->bgrtj", q, k) * (1.0 if mixer.decay is None else _fade(mixer.decay(call.hidden_BTD)))
    if mixer.pieces["key_weight"] == "competition":
        logit = torch.einsum("btgrf,bjgf->bgrtj", q, mixer.keys(call)).mean((2, 3)) / k.shape[-1] ** 0.5
        w = w * logit.softmax(-1)[:, :, None, None] * T
    if mixer.pieces["normaliser"] == "flow":
        out = _apply(_flow(w), call.v_BTGV)
    else:
        out = _normalised(mixer, call, w, all_)
    return out if mixer.output is None else mixer.output(out, call.hidden_BTD)


def _fade(log_BTG: Tensor) -> Tensor:
    """LION's decays [B, G, 1, T, J]: those of tokens j .. i - 1 for j < i, of i + 1 .. j for j > i."""
    upto = log_BTG.cumsum(1).transpose(1, 2)
    before = upto - log_BTG.transpose(1, 2)
    i, j = torch.arange(log_BTG.shape[1])[:, None], torch.arange(log_BTG.shape[1])[None]
    past, future = before[..., :, None] - before[..., None, :], upto[..., None, :] - upto[..., :, None]
    return torch.where(j <= i, past, future).exp().unsqueeze(2)


def _flow(w: Tensor) -> Tensor:
    """Flow-Attention's weights from w_ij = phi(q_i).phi(k_j): incoming flow I_i, outgoing flow O_j."""
    incoming, outgoing = w.sum(-1, keepdim=True), w.mean(2, keepdim=True).sum(-2, keepdim=True)
    competing = (w / incoming).mean(2, keepdim=True).sum(-2, keepdim=True).clamp(-1, 1).softmax(-1) * w.shape[-1]
    return torch.sigmoid((w / outgoing).sum(-1, keepdim=True)) * w * competing / incoming


def _agent(mixer: Agent, call: AttentionCall) -> Tensor:
    """Agent m pools the queries t with floor(t M / T) = m; stretches without a token are no agents."""
    T = call.q_BTGRK.shape[1]
    place = torch.arange(T) * mixer.agents // T
    agents = torch.stack([call.q_BTGRK[:, place == m].mean(1) for m in place.unique()], 1)
    inner = (torch.einsum("bmgrk,bjgk->bgrmj", agents, call.k_BTGK) * call.scale).softmax(-1)
    outer = (torch.einsum("btgrk,bmgrk->bgrtm", call.q_BTGRK, agents) * call.scale).softmax(-1)
    return _apply(outer @ inner, call.v_BTGV)


def _relative(mixer: RelativeFavor, call: AttentionCall) -> Tensor:
    i, j = torch.arange(call.q_BTGRK.shape[1])[:, None], torch.arange(call.q_BTGRK.shape[1])[None]
    bias = mixer.bias[:, (i - j).clamp(-mixer.span, mixer.span) + mixer.span]
    q, k = (mixer.map(normalize(x, dim=-1)).exp() for x in (call.q_BTGRK, call.k_BTGK))
    w = torch.einsum("btgrf,bjgf->bgrtj", q, k) * bias.exp()[:, None]
    return _apply(w / w.sum(-1, keepdim=True), call.v_BTGV)
