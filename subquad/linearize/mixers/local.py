"""The branch every mixer has: exact softmax over the first `sinks` and the last `window` real tokens of each row.

It also keeps the window: a token enters it when it arrives and is handed to the linear branch when it leaves, so the two branches never see
the same token (SEEDS 3.2 K9, disjoint coverage; C04, C05 sinks).

Key: as in base.py; W' <= window slots kept from earlier calls, X = W' + T extended slots, N sinks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.banded import banded_blocks
from subquad.kernels.ops import banded
from subquad.kernels.weights import divisor
from subquad.linearize.mixers.base import AttentionCall


@dataclass
class Local:
    """Un-normalised softmax sums of the window and sinks, and the tokens that left the window during this call.

    Query t reads the older tokens up to and including row t of `left_*`; `left_BT` is False where that row holds nothing (too early, a sink, filler).
    left_k is None when no token has left yet.
    """

    numerator: Tensor  # [B, T, G, R, V] fp32
    denominator: Tensor  # [B, T, G, R] fp32
    top: Tensor  # [B, T, G, R] fp32
    left_k: Tensor | None = None  # [B, T, G, K]
    left_v: Tensor | None = None
    left_extra: Tensor | None = None
    left_BT: Tensor | None = None

    def output(self) -> Tensor:
        """Softmax attention over window and sinks alone, fp32."""
        return self.numerator / divisor(self.denominator)


def plain_position(call: AttentionCall) -> int | None:
    """The tokens that came before this call, where all rows agree and the scores are plain: what the ops take. None: the masked form is needed.

    Without a state filler needs no mask: it follows the real tokens, which do not look ahead.
    """
    state = call.state
    if call.softcap is not None or call.sink_logit_GR is not None or (call.real_BT is not None and state is not None):
        return None
    if state is None or state.seen_B is None:
        return 0
    return state.fewest if bool((state.seen_B == state.fewest).all()) else None


def one_token(x_BT: Tensor) -> bool:
    """A decode step without gradients: the ops have a form for it, which updates the state in place."""
    return x_BT.shape[1] == 1 and not torch.is_grad_enabled()


@dataclass
class Extended:
    """The window of earlier calls with this call's tokens behind it: X = W' + T slots, and each row's sinks."""

    k: Tensor
    v: Tensor
    extra: Tensor | None
    before: int
    sink_k: Tensor | None
    sink_v: Tensor | None

    def given_sinks(self, seen: int) -> dict[str, Tensor | None]:
        """Sinks for an op call: apart from the slots unless the slots begin with them."""
        return {} if seen == 0 or self.sink_k is None else {"sink_k_BNGK": self.sink_k, "sink_v_BNGV": self.sink_v}


def extend(call: AttentionCall, sinks: int, extra_BTGX: Tensor | None = None) -> Extended:
    state = call.state
    if state is None:
        return Extended(call.k_BTGK, call.v_BTGV, extra_BTGX, 0, None, None)
    seen_B = state.seen_B if state.seen_B is not None else torch.zeros(call.k_BTGK.shape[0], dtype=torch.long, device=call.k_BTGK.device)
    sink_k, sink_v = _sinks(call, sinks, seen_B, state.fewest)
    k, v, extra, before = call.k_BTGK, call.v_BTGV, extra_BTGX, 0
    if state.window_k is not None:
        before = state.window_k.shape[1]
        k, v = torch.cat([state.window_k, k], 1), torch.cat([state.window_v, v], 1)
        extra = None if extra is None else torch.cat([state.window_extra, extra], 1)
    return Extended(k, v, extra, before, sink_k, sink_v)


def remember_slots(call: AttentionCall, slots: Extended, window: int) -> None:
    """Update the state's window, sinks and counts after a call that `plain_position` allowed."""
    if call.state is not None:
        B = call.k_BTGK.shape[0]
        seen_B = call.state.seen_B if call.state.seen_B is not None else torch.zeros(B, dtype=torch.long, device=call.k_BTGK.device)
        remember(call, slots.k, slots.v, slots.extra, slots.before, window, seen_B, slots.sink_k, slots.sink_v)


def window_attention(call: AttentionCall, window: int, sinks: int) -> Tensor:
    """[B, T, G, R, V] fp32: softmax attention over window and sinks alone; the state is updated."""
    return local_attention(call, window, sinks, normalise=True).numerator


def local_attention(call: AttentionCall, window: int, sinks: int, extra_BTGX: Tensor | None = None, normalise: bool = False) -> Local:
    """Attend, hand out what leaves the window, and update the state's window, sinks and token counts. normalise: as in ops.banded."""
    B, T = call.k_BTGK.shape[:2]
    position = plain_position(call)
    if position is not None:
        return _plain(call, extend(call, sinks, extra_BTGX), position, window, sinks, normalise)
    state = call.state
    seen_B = state.seen_B if state is not None and state.seen_B is not None else torch.zeros(B, dtype=torch.long, device=call.k_BTGK.device)
    fewest = state.fewest if state is not None else 0
    sink_k, sink_v = _sinks(call, sinks, seen_B, fewest)
    k, v, extra, before = call.k_BTGK, call.v_BTGV, extra_BTGX, 0
    if state is not None and state.window_k is not None:
        before = state.window_k.shape[1]
        k, v = torch.cat([state.window_k, k], 1), torch.cat([state.window_v, v], 1)
        extra = None if extra is None else torch.cat([state.window_extra, extra], 1)
    slots = torch.arange(before + T, device=k.device)
    # Slots before the first real token of a short row are empty; places after the last one are filler that no real query sees.
    valid = None if fewest >= before else slots >= before - seen_B[:, None].clamp_max(before)
    position_BT = seen_B[:, None] + torch.arange(T, device=k.device)
    sink_seen = position_BT[..., None] - torch.arange(sinks, device=k.device) >= window if sinks else None
    numerator, denominator, top = banded_blocks(
        call.q_BTGRK, k, v, window=window, scale=call.scale, valid_BX=valid, softcap=call.softcap, sink_logit_GR=call.sink_logit_GR,
        sink_k=sink_k, sink_v=sink_v, sink_seen_BTN=sink_seen, normalise=normalise,
    )  # fmt: skip
    local = Local(numerator, denominator, top)
    early = window - before  # the first queries of a young row have nothing leaving yet
    if T > early:
        local.left_k, local.left_v, local.left_extra = (None if x is None else _leaving(x, early, T) for x in (k, v, extra))
        local.left_BT = position_BT - window >= sinks
        if call.real_BT is not None:
            local.left_BT = local.left_BT & call.real_BT
    if state is not None:
        remember(call, k, v, extra, before, window, seen_B, sink_k, sink_v)
    return local


def _plain(call: AttentionCall, slots: Extended, position: int, window: int, sinks: int, normalise: bool) -> Local:
    B, T = call.k_BTGK.shape[:2]
    found = banded(
        call.q_BTGRK.flatten(2, 3),
        slots.k,
        slots.v,
        window=window,
        sinks=sinks,
        scale=call.scale,
        position=position,
        normalise=normalise,
        **slots.given_sinks(position),
    )
    G = call.k_BTGK.shape[2]
    local = Local(*(x.unflatten(2, (G, -1)) for x in found))
    early = window - slots.before
    if T > early:
        local.left_k, local.left_v, local.left_extra = (
            None if x is None else _leaving(x, early, T) for x in (slots.k, slots.v, slots.extra)
        )
        local.left_BT = (torch.arange(T, device=slots.k.device) + (position - window) >= sinks).expand(B, -1)
        if call.real_BT is not None:
            local.left_BT = local.left_BT & call.real_BT
    remember_slots(call, slots, window)
    return local


def _leaving(x: Tensor, early: int, T: int) -> Tensor:
    """Slots shifted so that row t is the token that leaves when query t arrives; zeros where there is none."""
    pad = (0, 0) * (x.dim() - 2) + (max(early, 0), 0)
    return F.pad(x[:, : T - early], pad)


def _sinks(call: AttentionCall, sinks: int, seen_B: Tensor, fewest: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of each row's first `sinks` real tokens, as far as they have arrived (others are masked by position)."""
    state = call.state
    if not sinks:
        return None, None
    if state is not None and state.sink_k is not None and fewest >= sinks:
        return state.sink_k, state.sink_v
    T = call.k_BTGK.shape[1]
    place = torch.arange(sinks, device=seen_B.device) - seen_B[:, None]  # [B, N]: where in this call sink n arrives
    index = place.clamp(0, T - 1)[:, :, None, None]
    k = call.k_BTGK.gather(1, index.expand(-1, -1, *call.k_BTGK.shape[2:]))
    v = call.v_BTGV.gather(1, index.expand(-1, -1, *call.v_BTGV.shape[2:]))
    if state is None or state.sink_k is None:
        return k, v
    old = (place < 0)[:, :, None, None]
    return torch.where(old, state.sink_k, k), torch.where(old, state.sink_v, v)


def remember(call, k, v, extra, before, window, seen_B, sink_k, sink_v) -> None:
    """Keep the last `window` real tokens of k, v [B, before + T, G, *] (and of what is kept with them) in the state, and count the new ones."""
    state, T = call.state, call.k_BTGK.shape[1]
    keep = min(window, before + T)
    if call.real_BT is None:
        counts, fewest = T, T
        # A view would keep the whole prompt alive; a few slots more do no harm.
        take = lambda x: x[:, -keep:] if x.shape[1] <= 2 * keep else x[:, -keep:].clone()  # noqa: E731
    else:
        counts, fewest = call.real_BT.sum(1), call.fewest
        index = ((before + counts)[:, None] - keep + torch.arange(keep, device=k.device)).clamp_min(0)
        take = lambda x: x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))  # noqa: E731
    state.window_k, state.window_v = take(k), take(v)
    state.window_extra = None if extra is None else take(extra)
    state.sink_k, state.sink_v = sink_k, sink_v
    state.seen_B = seen_B + counts
    state.fewest += fewest
