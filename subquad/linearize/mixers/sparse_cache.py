"""A sparse cache between window and state: pairs that are hard to remember stay exact (LoLA, arXiv 2505.23666).

    token leaves the window -> cache of `cache` pairs per key/value head -> the pair with the lowest score goes into the state

Queries see window, sinks and cached pairs under one softmax; the linear branch is handed what the cache lets go, one pair a token, as it is handed
what leaves the window otherwise. So every pair is seen by one branch only, and memory stays constant. The score is LoLA's self-recall error

    | (sum_j phi(k).phi(k_j) v_j) / (sum_j phi(k).phi(k_j)) - v |,    phi(k) = [softmax(4 k); softmax(-4 k)]

over all j that left before it. LoLA scores a pair anew whenever the state changes; here it keeps the score it got when it left the window, which makes
chunks, steps and whole texts agree.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K key size, V value size, X numbers kept with a token, C pairs in the cache,
U = C + T pairs in question: held before the call (by slot), then those of the call; Q queries of a block, n blocks, J = C + Q.
"""

from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.banded import attend_blocks
from subquad.kernels.features import hedgehog_softmax2
from subquad.kernels.ops import additive
from subquad.linearize.mixers.base import AttentionCall, HeadShape
from subquad.linearize.mixers.combine import TINY
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.local import Local

BLOCK = 64
SHARP = 4.0  # against 1: docs/log.md, 2026-11-27


def cache_parts(shape: HeadShape, size: int, extra: int) -> dict[str, tuple[int, ...]]:
    """Name -> size per sequence of what the cache adds to a cell's memory; extra: numbers kept with a token."""
    if not size:
        return {}
    G = shape.kv_heads
    parts = {"cache_k": (G, size, shape.key), "cache_v": (G, size, shape.value), "cache_score": (G, size)}
    return parts | ({"cache_extra": (G, size, extra)} if extra else {}) | {"recalled": (G, 2 * shape.key, shape.value + 1)}


def through_cache(call: AttentionCall, local: Local, parts: dict[str, Tensor]) -> Local:
    """`local` with the cached pairs among what it attends to, and what the cache lets go in the place of what left the window. Updates `parts`."""
    k, v, extra = (_questioned(parts.get(name), x) for name, x in
                   (("cache_k", local.left_k), ("cache_v", local.left_v), ("cache_extra", local.left_extra)))  # fmt: skip
    score, parts["recalled"] = recall_error(local.left_k, local.left_v, local.left_BT, parts["recalled"])
    T, held = score.shape[1], parts["cache_score"]
    choice = choose(score, local.left_BT, held, min(BLOCK, T))
    cached = attend_cached(call, k, v, shown_until(choice, local.left_BT, held), choice.held_BnGC)
    for name, x in (("cache_k", k), ("cache_v", v), ("cache_extra", extra)):
        if x is not None:
            parts[name] = _take(x, choice.last_BGC)
    parts["cache_score"] = torch.cat([held, score.transpose(1, 2)], 2).gather(2, choice.last_BGC)
    gone = choice.gone_BTG.transpose(1, 2)
    left = (None if x is None else _take(x, gone).transpose(1, 2) for x in (k, v, extra))
    return replace(merged(local, *cached), **dict(zip(("left_k", "left_v", "left_extra"), left, strict=True)), left_BT=choice.on_BT)


def _questioned(held_BGCK: Tensor | None, left_BTGK: Tensor | None) -> Tensor | None:
    """[B, G, U, K]."""
    return None if left_BTGK is None else torch.cat([held_BGCK.to(left_BTGK.dtype), left_BTGK.transpose(1, 2)], 2)


def _take(x_BGUK: Tensor, index_BGI: Tensor) -> Tensor:
    return x_BGUK.gather(2, index_BGI.unsqueeze(-1).expand(-1, -1, -1, x_BGUK.shape[-1]))


# --- who stays ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recall_error(k_BTGK: Tensor, v_BTGV: Tensor, on_BT: Tensor, sums_BGFV: Tensor) -> tuple[Tensor, Tensor]:
    """([B, T, G] fp32, the sums after the last token): how far the sums of all earlier tokens are from v when asked with k."""
    features = hedgehog_softmax2(SHARP * k_BTGK.float()).masked_fill(~on_BT[..., None, None], 0.0)
    v = F.pad(v_BTGV.float(), (0, 1), value=1.0)
    sums = sums_BGFV
    if v.shape[1] == 1:
        y = torch.einsum("btgf,bgfv->btgv", features, sums)
    else:
        before = (F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)) for x in (features, v))  # a token is not asked for itself
        y, sums = additive(features, *before, initial_state=sums, output_final_state=True)
    sums = sums + features[:, -1].unsqueeze(-1) * v[:, -1].unsqueeze(-2)
    return (y[..., :-1] / y[..., -1:].clamp_min(TINY) - v[..., :-1]).norm(dim=-1), sums


@dataclass
class Choice:
    """What stays and what goes; numbers are those of the pairs in question."""

    gone_BTG: Tensor  # the pair let go at row t: the row's own where it is not admitted
    on_BT: Tensor  # row t lets go of a pair that holds something
    held_BnGC: Tensor  # pairs in the cache before each block of queries
    last_BGC: Tensor  # after the call


@torch.no_grad()
def choose(score_BTG: Tensor, on_BT: Tensor, held_BGC: Tensor, block: int) -> Choice:
    """Row by row the pair with the lowest score goes; an empty slot (score NOTHING) counts as one that goes first.

    One heap per sequence and key/value head, on the host.
    """
    on, scores, held = on_BT.tolist(), score_BTG.transpose(1, 2).tolist(), held_BGC.tolist()
    found = [[_choose(score, on[b], held[b][g], block) for g, score in enumerate(row)] for b, row in enumerate(scores)]
    gone, before, last = (torch.tensor([[head[i] for head in row] for row in found], device=on_BT.device) for i in range(3))
    empty = (held_BGC[:, 0] == NOTHING).sum(1, keepdim=True)  # of one head: all have as many
    return Choice(gone.transpose(1, 2), on_BT & (on_BT.cumsum(1) > empty), before.transpose(1, 2), last)


def _choose(score: list[float], on: list[bool], held: list[float], block: int) -> tuple[list[int], list[list[int]], list[int]]:
    """(pair let go by each row, pairs held before each block, pairs held at the end) of one head."""
    heap = [(old, slot) for slot, old in enumerate(held)]
    heapify(heap)
    now, gone, before = list(range(len(held))), [], []
    for t, new in enumerate(score):
        if t % block == 0:
            before.append(now.copy())
        pair = len(held) + t
        if on[t] and new > heap[0][0]:
            slot = heap[0][1]
            heapreplace(heap, (new, slot))
            pair, now[slot] = now[slot], pair
        gone.append(pair)
    return gone, before, now


def shown_until(choice: Choice, on_BT: Tensor, held_BGC: Tensor) -> Tensor:
    """[B, G, U]: the row from which on a pair is no longer in the cache; -1 for empty slots and rows without a token."""
    T, G = choice.gone_BTG.shape[1:]
    never = torch.where(on_BT, T, -1).unsqueeze(1).expand(-1, G, -1)
    until = torch.cat([torch.where(held_BGC == NOTHING, -1, T), never], 2)
    row = torch.arange(T, device=on_BT.device).expand_as(never)
    gone = choice.gone_BTG.transpose(1, 2)
    return until.scatter(2, gone, torch.minimum(row, until.gather(2, gone)))


# --- attention ------------------------------------------------------------------------------------------------------------------------------


def attend_cached(call: AttentionCall, k_BGUK: Tensor, v_BGUV: Tensor, until_BGU: Tensor, held_BnGC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(numerator, denominator, maximum) of Local over the cached pairs: a block of queries looks at those held before it and those of its own rows."""
    T, C = call.q_BTGRK.shape[1], held_BnGC.shape[3]
    n, Q = held_BnGC.shape[1], min(BLOCK, T)
    own = torch.arange(n * Q, device=k_BGUK.device).view(n, Q)
    index = torch.cat([held_BnGC.transpose(1, 2), (C + own).expand(*until_BGU.shape[:2], -1, -1)], 3).flatten(2)  # [B, G, n J]
    entered = torch.cat([own.new_full((n, C), -1), own], 1)  # [n, J]
    inside = index.clamp_max(k_BGUK.shape[2] - 1)  # rows after the last token are no pairs
    k, v = (_take(x, inside).unflatten(2, (n, -1)) for x in (k_BGUK, v_BGUV))
    until = until_BGU.gather(2, inside).unflatten(2, (n, -1))
    shown = (entered[:, None] <= own[..., None]) & (until.unsqueeze(3) > own[..., None])  # [B, G, n, Q, J]
    return attend_blocks(call.q_BTGRK, k, v, shown, scale=call.scale, softcap=call.softcap)


def merged(local: Local, numerator: Tensor, denominator: Tensor, top: Tensor) -> Local:
    """Both sums under one maximum."""
    shift = torch.where(denominator > 0, top, local.top)
    common = torch.maximum(local.top, shift).detach()
    a, b = (local.top - common).exp(), (shift - common).exp()
    return replace(
        local,
        numerator=a.unsqueeze(-1) * local.numerator + b.unsqueeze(-1) * numerator,
        denominator=a * local.denominator + b * denominator,
        top=common,
    )
