"""Slots, token by token: the share that every token has in every slot. The oracle of slots.py.

Key: as in definition.py; M slots.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.combine import LEAST
from subquad.linearize.mixers.slots import DAMPING, LIMIT


def slot_weights(mixer, call: AttentionCall, older: Tensor) -> tuple[Tensor, Tensor]:
    """(w [B, G, R, T, J], sum over slots of e^(slot logit) times the share of token j in that slot; the sum of e^(slot logit) alone).

    Shares of a slot need not add up to one. One token at a time."""
    lag, first = (mixer.window, mixer.sinks) if mixer.rows.combine.older else (0, 0)
    q, k = mixer.queries(call), mixer.keys(call)
    out, totals = [], []
    for t, share in enumerate(
        {"gated_slots": _gated, "softmax_slots": _softmax, "slots": _written}[mixer.pieces["container"]](mixer, call, lag, first)
    ):
        keys = torch.einsum("bgmj,bjgk->bgmk", share, k)
        logits = torch.einsum("bgrk,bgmk->bgrm", q[:, t], keys) * call.scale
        out.append(torch.einsum("bgrm,bgmj->bgrj", logits.exp(), share))
        totals.append(logits.exp().sum(-1, keepdim=True) * (t - lag >= first))
    return torch.stack(out, 3) * older, torch.stack(totals, 3)


def _start(z: Tensor) -> tuple[Tensor, Tensor]:
    """(shares [B, G, M, T] before anything is written, the tokens' numbers)."""
    B, T, G, M = z.shape
    return z.new_zeros(B, G, M, T), torch.arange(T)


def _gated(mixer, call: AttentionCall, lag: int, first: int):
    z = mixer.slot(call.hidden_BTD)
    share, tokens = _start(z)
    for t in tokens:
        if (j := t - lag) >= first:
            f = torch.sigmoid(z[:, j]) ** (1 / DAMPING)
            share = share * f[..., None] + (1 - f)[..., None] * (tokens == j)
        yield share


def _softmax(mixer, call: AttentionCall, lag: int, first: int):
    z = mixer.slot(call.hidden_BTD).clamp(-LIMIT, LIMIT)
    share, tokens = _start(z)
    seen = torch.full_like(share[..., 0], float("-inf"))
    for t in tokens:
        if (j := t - lag) >= first:
            now = torch.logaddexp(seen, z[:, j])
            share = share * (seen - now).exp()[..., None] + (z[:, j] - now).exp()[..., None] * (tokens == j)
            seen = now
        yield share


def _written(mixer, call: AttentionCall, lag: int, first: int):
    """The cell's own recurrence, for values that name their token."""
    z = mixer.slot(call.hidden_BTD)
    share, tokens = _start(z)
    total, delta = torch.zeros_like(share[..., :1]), mixer.pieces["write"] == "delta"
    log = torch.zeros_like(z) if mixer.decay is None else mixer.decay(call.hidden_BTD)
    a = (log if log.dim() == 4 else log[..., None]).exp()[..., None]  # [B, T, G, 1 or M, 1]
    for t in tokens:
        j = t - lag
        if mixer.rows.decay.clock == "now" or j >= first:
            fade = a[:, t if mixer.rows.decay.clock == "now" else j]
            share, total = share * fade, total * fade
        if j >= first and delta:
            s, beta = z[:, j].exp() / z[:, j].exp().norm(dim=-1, keepdim=True), torch.sigmoid(mixer.beta(call.hidden_BTD)[:, j])
            wrong = (tokens == j).to(share.dtype) - torch.einsum("bgm,bgmj->bgj", s, share)
            share = share + s[..., None] * (beta * wrong).unsqueeze(2)
        elif j >= first:
            s = z[:, j].clamp(-LIMIT, LIMIT).exp() * _strength(mixer, call)[:, j]
            share, total = share + s[..., None] * (tokens == j), total + s[..., None]
        yield share if delta else share / total.clamp_min(LEAST)


def _strength(mixer, call: AttentionCall) -> Tensor:
    """[B, T, G, 1 or M]."""
    if mixer.pieces["write"] == "step":
        return mixer.decay.step(call.hidden_BTD)[..., None]
    if mixer.pieces["write"] == "dual":
        g, tau = mixer.decay.parts(call.hidden_BTD)
        return g**tau
    return torch.ones(*call.hidden_BTD.shape[:2], 1, 1)
