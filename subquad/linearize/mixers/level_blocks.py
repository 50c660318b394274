"""Levels of many tokens at once from states of earlier ones (prefill in chunks): what `read_steps` gives token by token.

A block of earlier tokens has one level for every later query, so its state is read as it is, turned by the tokens since, with the weight of that level;
tokens of the call read each other as in training. At the end every token, or block of earlier ones, goes to the level at which the last token has it.

Key: as in levels.py.
"""

import torch
from torch import Tensor

from subquad.kernels.ops import additive, delta
from subquad.linearize.mixers.delta_levels import read_all_delta
from subquad.linearize.mixers.levels import LEVELS, levels_between, read_all


def together(on_BT: Tensor, written_B: Tensor) -> tuple[int, int] | None:
    """(tokens written before the call, row of its first), where all rows agree on both; None: they go token by token."""
    if on_BT.shape[1] == 1 or not bool(on_BT.any()) or bool((written_B != written_B[0]).any()):
        return None
    first = int(on_BT.any(0).long().argmax())
    rest = on_BT[:, first:]
    some = rest.any(1)
    in_order = bool((rest[:, 1:] <= rest[:, :-1]).all()) and bool((rest[:, 0] | ~some).all())
    return (int(written_B[0]), first) if in_order else None


def read_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor | None,
    weight: Tensor,
    on_BT: Tensor,
    states: Tensor,
    place: tuple[int, int],
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, states [B, L, G, F, V], written [B]); arguments as for `read_steps`. Nothing was written where `place` says the first token is not row 0."""
    before, first = place
    *given, weight, on_BT = (None if x is None else x[:, first:] for x in (q, k, v, log, beta, weight, on_BT))
    q_, k, v, log, beta = given
    y = read_all(q_, k, v, log, weight, before) if beta is None else read_all_delta(q_, k, v, beta, log, weight, before)
    written = before + on_BT.sum(1)
    fresh = before + torch.arange(k.shape[1], device=k.device)
    into = levels_between((written - 1).clamp_min(0)[:, None], fresh[None])  # [B, T]
    member = torch.nn.functional.one_hot(into, LEVELS).to(v.dtype)
    end = _run(k.new_zeros(q_[:, :, :, :1].shape), k, torch.einsum("btl,btgv->btglv", member, v), log, beta, None)[1]
    if before:
        blocks = earlier(before).to(k.device)
        read, moved = _run(q_, k, v.new_zeros(*v.shape[:3], LEVELS, v.shape[-1]), log, beta, states)
        level = levels_between(fresh[:, None], blocks[None])  # [T, L]
        y = y + torch.einsum("btgrlv,btgrl->btgrv", read, weight.gather(-1, level[:, None, None].expand(*weight.shape[:4], -1)))
        into = levels_between((written - 1)[:, None], blocks[None])  # [B, L]
        end = end + torch.einsum("bmgfv,bml->blgfv", moved, torch.nn.functional.one_hot(into, LEVELS).to(v.dtype))
    return torch.cat([y.new_zeros(y.shape[0], first, *y.shape[2:]), y], 1), end, written


def earlier(before: int) -> Tensor:
    """[L]: a token of the block that each level holds once `before` tokens are written; the highest level's holds the first."""
    last, place = before - 1, torch.arange(1, LEVELS)
    return torch.cat([torch.tensor([last]), last >> place << place])[:LEVELS].index_fill(0, torch.tensor([LEVELS - 1]), 0)


def _run(q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what q reads in every level's state [B, T, G, R, L, V], the states after the last token) of values [B, T, G, L, V], levels side by side."""
    start = None if states is None else states.permute(0, 2, 3, 1, 4).flatten(3).contiguous()
    more = dict(initial_state=start, output_final_state=True)
    if beta is None:
        y, end = additive(q.flatten(2, 3), k, v.flatten(3), log, **more)
    else:
        y, end = delta(q.flatten(2, 3), k, v.flatten(3), beta, log, **more)
    return y.unflatten(2, q.shape[2:4]).unflatten(-1, v.shape[3:]), end.unflatten(-1, v.shape[3:]).permute(0, 3, 1, 2, 4)
