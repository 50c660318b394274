"""What the linear branch is given: at query row t the token that is written then, with everything kept with it, and where both stand.

Key: B batch, T tokens, G key/value heads, K key size, V value size, X numbers kept with a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.local import Local


@dataclass
class Stream:
    """Rows of the tokens to be written; on_BT is False where a row holds nothing (too early, a sink, filler)."""

    k: Tensor  # [B, T, G, K]
    v: Tensor
    on_BT: Tensor
    kept: dict[str, Tensor]  # name -> [B, T, G, *]
    q_position_BT: Tensor
    k_position_BT: Tensor


def pack_kept(kept: dict[str, Tensor]) -> Tensor | None:
    """[B, T, G, X]: one tensor, so that the window keeps one."""
    return torch.cat([x.float() for x in kept.values()], -1) if kept else None


def unpack_kept(packed: Tensor | None, sizes: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, packed.split(list(sizes.values()), -1), strict=True)) if sizes else {}


def seen(call: AttentionCall) -> Tensor:
    """[B]: real tokens of each row before this call."""
    state = call.state
    if state is not None and state.seen_B is not None:
        return state.seen_B
    return torch.zeros(call.k_BTGK.shape[0], dtype=torch.long, device=call.k_BTGK.device)


def positions(call: AttentionCall, seen_B: Tensor) -> Tensor:
    return seen_B[:, None] + torch.arange(call.k_BTGK.shape[1], device=seen_B.device)


def real(call: AttentionCall) -> Tensor:
    """[B, T] bool."""
    if call.real_BT is not None:
        return call.real_BT
    return torch.ones(call.k_BTGK.shape[:2], dtype=torch.bool, device=call.k_BTGK.device)


def leaving(local: Local, sizes: dict[str, int], position_BT: Tensor, window: int) -> Stream:
    """The tokens that leave the window."""
    kept = unpack_kept(local.left_extra, sizes)
    return Stream(local.left_k, local.left_v, local.left_BT, kept, position_BT, position_BT - window)


def whole(call: AttentionCall, kept: dict[str, Tensor], position_BT: Tensor) -> Stream:
    """Every token of the call, written at once."""
    return Stream(call.k_BTGK, call.v_BTGV, real(call), kept, position_BT, position_BT)


def count(call: AttentionCall) -> None:
    """Note this call's tokens in the state, for mixers that keep no window."""
    if call.state is not None:
        call.state.seen_B = seen(call) + real(call).sum(1)
        call.state.fewest += call.k_BTGK.shape[1] if call.real_BT is None else call.fewest
