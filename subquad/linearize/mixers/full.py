"""Mixers that keep every key and value: other weights in the place of the softmax, and sparse attention over all tokens (SEEDS D, E, J01).

Queries go in blocks, so that no T x X matrix of all queries stands in memory at once. Key: as in base.py; X tokens so far, C queries of a block.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.local import remember
from subquad.linearize.mixers.score_weights import WEIGHTS, Seen
from subquad.linearize.mixers.stream import positions, real, seen

BLOCK = 128
FORGET_BIAS = 8.0  # log sigmoid(8) = -3e-4 a token
OPEN, SHUT = 6.0, -6.0  # of gates that start at 1 and 0
PRUNED = -10.0  # natural log of the mass that pruning may lose in a row


@dataclass
class Everything:
    """All tokens so far. position_BX < 0 where a slot is empty; filler of this call is not visible."""

    k: Tensor  # [B, X, G, K]
    v: Tensor
    extra: Tensor | None  # [B, X, G, E]
    position_BX: Tensor
    visible_BX: Tensor
    position_BT: Tensor  # of this call's queries


def everything(call: AttentionCall, extra_BTGE: Tensor | None = None, window: int | None = None) -> Everything:
    """The cache with this call's tokens. They are kept in the state's window, which grows (to `window` tokens, if given)."""
    state, T = call.state, call.k_BTGK.shape[1]
    seen_B, k, v, extra, before = seen(call), call.k_BTGK, call.v_BTGV, extra_BTGE, 0
    if state is not None and state.window_k is not None:
        before = state.window_k.shape[1]
        k, v = torch.cat([state.window_k, k], 1), torch.cat([state.window_v, v], 1)
        extra = None if extra is None else torch.cat([state.window_extra, extra], 1)
    position = seen_B[:, None] - before + torch.arange(before + T, device=k.device)
    visible = torch.cat([position[:, :before] >= 0, real(call)], 1)
    if state is not None:
        remember(call, k, v, extra, before, window or before + T, seen_B, None, None)
    return Everything(k, v, extra, position, visible, positions(call, seen_B))


class Full(Mixer):
    """weights(s) v over all tokens so far, s_tj = scale q_t.k_j, with weights a row of score_weights.py.

    forget: c_t - c_j is added to s, c the running sum of log sigmoid(W x + b) (FoX); under a softmax keys that fade below e^-10 of a row are not looked at.
    gated: the output times sigmoid(W x + b).
    blocks: only the own block of 64 tokens and the `top` blocks with the largest q.mean(k) are looked at (MoBA).
    near: only the last `window` tokens are kept and looked at, and slope_h (t - j) is added to s, slopes 2^(-8 h / H) of both signs (SWAT).
    """

    BLOCK_KEYS = 64

    def __init__(
        self,
        shape: HeadShape,
        window: int,
        sinks: int,
        weights: str = "softmax",
        forget: bool = False,
        gated: bool = False,
        blocks: bool = False,
        near: bool = False,
        top: int = 4,
    ):
        super().__init__(shape, window, sinks)
        self.row, self.top, self.blocks, self.near = WEIGHTS[weights], top, blocks, near
        G, R = shape.kv_heads, shape.groups
        self.p = None if self.row.start is None else nn.Parameter(torch.full((G, R), self.row.start))
        self.forget = InputGate(shape.hidden, (G, R), FORGET_BIAS) if forget else None
        self.gate = InputGate(shape.hidden, (G, R), OPEN) if gated else None
        if near:
            slopes = -torch.exp2(-8.0 * (torch.arange(G * R, device="cpu") // 2 + 1) * 2 / (G * R))
            self.register_buffer("slopes", (slopes * (1 - 2 * (torch.arange(G * R, device="cpu") % 2))).view(G, R))

    def forward(self, call: AttentionCall) -> Tensor:
        log = None
        if self.forget is not None:
            log = F.logsigmoid(self.forget(call.hidden_BTD)) * real(call)[..., None, None]
            last = 0.0 if call.state is None or call.state.memory is None else call.state.memory.unsqueeze(1)
            log = last + log.cumsum(1)
            if call.state is not None:
                call.state.memory = log[:, -1]
        all_ = everything(call, log, self.window if self.near else None)
        T, out = call.q_BTGRK.shape[1], []
        for start in range(0, T, BLOCK):
            out.append(self.attend(call, all_, slice(start, min(start + BLOCK, T)), log))
        out = torch.cat(out, 1)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(call.hidden_BTD)).unsqueeze(-1)
        return out.to(call.v_BTGV.dtype)

    def attend(self, call: AttentionCall, all_: Everything, rows: slice, log: Tensor | None) -> Tensor:
        """Some queries against what they can see."""
        q, position, before = call.q_BTGRK[:, rows], all_.position_BT[:, rows], all_.k.shape[1] - call.k_BTGK.shape[1]
        prunes = log is not None and self.row.fades and not self.blocks  # others count the keys, or take the means of whole blocks
        first = self.faded(call, all_, q, log[:, rows]) if prunes else 0
        first = max(before + rows.start - self.window + 1, 0) if self.near else first
        cut = slice(first, before + rows.stop)
        k, v, place, visible = all_.k[:, cut], all_.v[:, cut], all_.position_BX[:, cut], all_.visible_BX[:, cut]
        s = scores(call, q, k)
        if log is not None:
            s = s + (log[:, rows].permute(0, 2, 3, 1).unsqueeze(-1) - all_.extra[:, cut].float().permute(0, 2, 3, 1).unsqueeze(-2))
        apart = position[:, :, None] - place[:, None]
        mask = (apart >= 0) & visible[:, None]
        if self.near:
            mask = mask & (apart < self.window)
            s = s + self.slopes.float()[None, :, :, None, None] * apart[:, None, None]
        mask = mask[:, None, None]
        n = mask.sum(-1, keepdim=True).clamp_min(1).float()
        if self.blocks:
            mask = mask & chosen_blocks(q, k, place, visible, position, self.BLOCK_KEYS, self.top)
        s = s.masked_fill(~mask, NOTHING)
        weights = self.row.fn(s, Seen(mask, n, None if self.p is None else self.p.float()[:, :, None, None]))
        if call.sink_logit_GR is not None:
            weights = weights * sink_share(s, call.sink_logit_GR)
        return torch.einsum("bgrtx,bxgv->btgrv", weights, v.float())

    def faded(self, call: AttentionCall, all_: Everything, q: Tensor, c: Tensor) -> int:
        """The first slot that any query of the block can still see through its forget gates (adaptive computation pruning)."""
        with torch.no_grad():
            bound = 2 * call.scale * q.float().norm(dim=-1).max() * all_.k.float().norm(dim=-1).max()
            limit = -bound - torch.log(torch.tensor(float(all_.k.shape[1]))) + PRUNED
            gone = (c[:, :1].flatten(2) - all_.extra.float().flatten(2) < limit) | ~all_.visible_BX[..., None]
            dead = gone.all(2).all(0)
            alive = (~dead).nonzero()
            return int(alive[0]) if len(alive) else 0

    @classmethod
    def memory_bytes(cls, shape: HeadShape, forget: bool = False, **pieces) -> int:
        return 4 * shape.kv_heads * shape.groups if forget else 0

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, near: bool = False, **pieces) -> tuple[int, int]:
        return min(tokens, window) if near else tokens, 0

    @classmethod
    def extra_size(cls, shape: HeadShape, forget: bool = False, **pieces) -> int:
        return shape.groups if forget else 0


def scores(call: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
    """[B, G, R, T, X] fp32, softcapped."""
    s = torch.einsum("btgrk,bxgk->bgrtx", q.float(), k.float()) * call.scale
    return s if call.softcap is None else call.softcap * torch.tanh(s / call.softcap)


def sink_share(s: Tensor, sink_GR: Tensor) -> Tensor:
    """What a teacher's learned sink leaves of a row: sum e^s / (e^sink + sum e^s)."""
    return torch.sigmoid(torch.logsumexp(s, -1, keepdim=True) - sink_GR.float()[None, :, :, None, None])


def block_means(k: Tensor, place: Tensor, visible: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(mean key of every block of `size` positions [B, N, G, K], tokens in it [B, N])."""
    block = torch.where(visible, place.clamp_min(0) // size, 0)
    count = int(place.max().clamp_min(0)) // size + 1
    member = F.one_hot(block, count).float() * visible[..., None]
    number = member.sum(1)
    return torch.einsum("bxn,bxgk->bngk", member, k.float()) / number.clamp_min(1)[..., None, None], number


def chosen_blocks(q: Tensor, k: Tensor, place: Tensor, visible: Tensor, position: Tensor, size: int, top: int) -> Tensor:
    """[B, G, R, T, X] bool: keys of the query's own block and of the `top` - 1 past blocks with the largest q.mean(k)."""
    mean, _ = block_means(k, place, visible, size)
    own, blocks = position // size, torch.arange(mean.shape[1], device=k.device)
    score = torch.einsum("btgrk,bngk->bgrtn", q.float(), mean)
    past = (blocks < own[..., None])[:, None, None]
    score = score.masked_fill(~past, NOTHING)
    kept = score.topk(min(max(top - 1, 0), score.shape[-1]), -1).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True) & past
    chosen = chosen | (blocks == own[..., None])[:, None, None]
    index = (place.clamp_min(0) // size)[:, None, None, None].expand(*chosen.shape[:4], -1)
    return chosen.gather(-1, index)
