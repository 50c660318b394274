"""The cell by one op, where its pieces and the call allow it: `window_linear`, or `window_linear_step` for a decode step.

Key: as in base.py.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.kernels.ops import banded, window_linear, window_linear_step
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.knobs import rows_of
from subquad.linearize.mixers.local import extend, one_token, remember_slots

# What the ops do: window, sinks and plain sums of features under one normaliser.
PIECES = dict(combine="joint", write="additive", container="plain", normaliser="sum", key_weight="none", position="keep", cache=0)


def fits(pieces: dict[str, Any]) -> bool:
    """The ops do all of it; decays they take are those of the reading token, features as they are."""
    rows = rows_of(pieces)
    now = rows.decay.module is None or rows.decay.clock == "now"
    return now and not rows.feature_map.exponential and all(pieces[knob] == name for knob, name in PIECES.items())


def in_one_pass(cell, call: AttentionCall, position: int) -> Tensor:
    """o [B, T, G, R, V]. `position`: the tokens that came before this call (local.plain_position)."""
    slots, T, state = extend(call, cell.sinks), call.k_BTGK.shape[1], call.state
    memory = state.memory if state is not None else None
    q = call.q_BTGRK.flatten(2, 3)
    older = slots.before + T > cell.window  # something leaves the window in this call
    places = torch.arange(-slots.before, T, device=q.device).expand(q.shape[0], -1) + position
    now = places[:, slots.before :]
    decay = None
    if older and cell.decay is not None:
        decay = cell.decay(call.hidden_BTD)
        if call.real_BT is not None:
            decay = decay.masked_fill(~call.real_BT.view(*call.real_BT.shape, *(1,) * (decay.dim() - 2)), 0.0)
    if state is not None and one_token(q) and position >= cell.window + cell.sinks and memory is not None:
        out = window_linear_step(
            q[:, 0], slots.k[:, 1:], slots.v[:, 1:], cell.map_q(cell.asked(call), now)[:, 0].flatten(1, 2),
            cell.mix(call.hidden_BTD)[:, 0].flatten(1), memory, cell.map_k(slots.k[:, :1], places[:, :1])[:, 0], slots.v[:, 0],
            None if decay is None else decay[:, 0], scale=call.scale, sink_k_BNGK=slots.sink_k, sink_v_BNGV=slots.sink_v,
        ).unsqueeze(1)  # fmt: skip
    elif older:
        fused = cell.rows.feature_map.fused
        asked = cell.asked(call)
        fq, fk = (cell.map_q(asked, now), cell.map_k(slots.k, places)) if fused is None else (cell.map_q.numbers(asked), cell.map_k.numbers(slots.k))
        out, memory = window_linear(
            q, slots.k, slots.v, fq.flatten(2, 3), fk, cell.mix(call.hidden_BTD).flatten(2), decay, window=cell.window, sinks=cell.sinks,
            scale=call.scale, position=position, initial_state=memory, output_final_state=state is not None, feature_map=fused,
            **slots.given_sinks(position),
        )  # fmt: skip
    else:
        given = slots.given_sinks(position)
        out = banded(q, slots.k, slots.v, window=cell.window, sinks=cell.sinks, scale=call.scale, position=position, normalise=True, **given)[0]
    remember_slots(call, slots, cell.window)
    if state is not None:
        state.memory = memory
    return out.unflatten(2, call.q_BTGRK.shape[2:4]).to(call.v_BTGV.dtype)
