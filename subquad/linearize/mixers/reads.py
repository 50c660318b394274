"""Reads: what the state answers to the queries of a call, and what it is after it. One function and one row per kind of state.

Every read takes (cell, call, stream, now, parts) and gives (Sums, log scale taken out of them); it updates `parts`, the named parts of what the
cell remembers. Key: as in cell.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.kernels.ops import additive, additive_step, delta, delta_step
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.combine import LEAST, TINY
from subquad.linearize.mixers.delta_levels import read_all_delta
from subquad.linearize.mixers.key_weights import NOTHING, running
from subquad.linearize.mixers.level_blocks import read_block, together
from subquad.linearize.mixers.levels import read_all, read_steps
from subquad.linearize.mixers.local import one_token
from subquad.linearize.mixers.normalisers import Sums
from subquad.linearize.mixers.partitions import routed
from subquad.linearize.mixers.positions import turned
from subquad.linearize.mixers.slots import (
    corrected,
    gated_slots,
    slot_logits,
    slot_totals,
    slot_writes,
    softmax_parts,
    softmax_slots,
    unit_writes,
)
from subquad.linearize.mixers.steps import momentum_steps, selective_steps
from subquad.linearize.mixers.stream import Stream
from subquad.linearize.mixers.writes import complement

Parts = dict[str, Tensor]
Read = tuple[Sums, Tensor | float]

# --- what meets in the state ---------------------------------------------------------------------------------------------------------------


def query_features(cell, call: AttentionCall, position: Tensor, now: Parts) -> Read:
    """(phi_q [B, T, G, R, F], log scale taken out of it)."""
    q, log_scale = cell.map_q(cell.asked(call), position), 0.0
    if "q" in cell.rows.feature_map.exponential:
        top = q.amax(-1, keepdim=True).detach()
        q, log_scale = (q - top).exp(), top.squeeze(-1)
    if "phase" in now:
        q = turned(q, now["phase"].unsqueeze(3), cell.rows.position.doubles)
    return (routed(q, now["route"].unsqueeze(3)) if "route" in now else q), log_scale


def key_features(cell, stream: Stream, parts: Parts) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """(phi_k [B, T, G, F], 0 where nothing is written; log decay that keeps its largest exponent in place; log scale taken out)."""
    kept, decay, log_scale = stream.kept, None, 0.0
    if cell.rows.write.complement:
        k = complement(cell.decay(stream.k))
    else:
        k = cell.map_k(kept.get("plain", stream.k), stream.k_position_BT)
    if "k" in cell.rows.feature_map.exponential:
        # The largest exponent so far is the unit of the state (SEEDS 0.14): where it grows, the state shrinks by as much.
        highest = k.detach().amax(-1).masked_fill(~stream.on_BT[..., None], NOTHING)
        tops = torch.cummax(torch.cat([parts["top"].unsqueeze(1), highest], 1), 1)[0]
        decay = (tops[:, :-1] - tops[:, 1:]).masked_fill(tops[:, :-1] <= NOTHING / 2, 0.0)
        k = (k - tops[:, 1:, :, None]).clamp_max(0.0).exp()
        log_scale, parts["top"] = tops[:, 1:, :, None], tops[:, -1]
    if "strength" in kept:
        k = k * kept["strength"]
    if "weight" in kept and cell.rows.key_weight.on == "key":
        k = k * kept["weight"]
    if "phase" in kept:
        k = turned(k, kept["phase"], cell.rows.position.doubles)
    if "route" in kept:
        k = routed(k, kept["route"])
    return k.masked_fill(~stream.on_BT[..., None, None], 0.0), decay, log_scale


def log_decay(cell, call: AttentionCall, stream: Stream) -> Tensor | None:
    """[B, T, G] or [B, T, G, F]; 0 where no token goes by."""
    if cell.decay is None:
        return None
    row = cell.rows.decay
    if row.clock == "now":
        log, on = cell.decay(call.hidden_BTD), call.real_BT
    else:
        log = cell.decay(stream.k) if row.reads == "key" else stream.kept["decay"]
        log, on = log if row.vector else log.squeeze(-1), stream.on_BT
    if on is not None:
        log = log.masked_fill(~on.view(*on.shape, *(1,) * (log.dim() - 2)), 0.0)
    if row.vector and cell.rows.position.doubles:
        log = torch.cat([log, log], -1)
    if row.vector and cell.rows.container.times:
        log = log.repeat_interleave(cell.pieces[cell.rows.container.number], -1)
    return log


# --- sums over features --------------------------------------------------------------------------------------------------------------------


def read_additive(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts, scan: Callable | None = None) -> Read:
    """q.S of S <- a S + k v^T, with the columns and the row that normalisers ask for. `scan`: how the state goes along the tokens."""
    rows, V, on = cell.rows, cell.shape.value, stream.on_BT[..., None, None].float()
    if scan is None and fused(cell, call, stream, now):
        return read_fused(cell, call, stream, now, parts)
    q, q_scale = query_features(cell, call, stream.q_position_BT, now)
    k, shift, k_scale = key_features(cell, stream, parts)
    decay = _plus(log_decay(cell, call, stream), shift)
    v = stream.v.float() * on
    columns = [v * stream.kept["weight"] if rows.key_weight.on == "value" else v]
    if cell.has_total:
        columns.append(torch.ones_like(v[..., :1]))
    if rows.key_weight.column:
        columns.append(stream.kept[rows.key_weight.column])
    F, counted = k.shape[-1], None
    if rows.normaliser.counts:  # the row below the features': the sum of values and the count
        counted, parts["sums"] = parts["sums"][:, :, F], parts["sums"][:, :, :F]
    if rows.normaliser.per_feature:
        q = q / running(k, parts["sums"][..., V]).clamp_min(TINY).unsqueeze(3)
    y = (scan or _scan)(cell, call, stream, (q, k, torch.cat(columns, -1), decay), parts)
    sums = Sums(y[..., :V], y[..., V] if cell.has_total else None, eps=rows.feature_map.floor)
    if counted is not None:
        sums.u, n = running(v, counted[..., :V]), running(on[..., 0].expand(-1, -1, counted.shape[1]), counted[..., V])
        sums.n = n[:, :, 0]
        rest = counted.new_zeros(*counted.shape[:2], counted.shape[2] - V - 1)
        parts["sums"] = torch.cat([parts["sums"], torch.cat([sums.u[:, -1], n[:, -1, :, None], rest], -1).unsqueeze(2)], 2)
    if rows.key_weight.column:
        sums.allocation = y[..., V + 1] / sums.n.clamp_min(1)[..., None, None]
    return sums, q_scale + k_scale


def fused(cell, call: AttentionCall, stream: Stream, now: Parts) -> bool:
    """The op can apply the map itself: nothing else is done to features, and the sums are those of features and values alone."""
    rows, plain = cell.rows, {"decay", "plain"} >= stream.kept.keys() and not now
    own = rows.normaliser.counts or rows.normaliser.per_feature or rows.key_weight.column or rows.write.complement
    return plain and not own and rows.feature_map.fused is not None and not one_token(call.q_BTGRK)


def read_fused(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    """`read_additive` with the map inside the op. A row that writes nothing has no zero features there, but zeros for values and for their count."""
    V, on = cell.shape.value, stream.on_BT[..., None, None].float()
    q, k = cell.map_q.numbers(cell.asked(call)), cell.map_k.numbers(stream.kept.get("plain", stream.k))
    v = stream.v.float() * on
    if cell.has_total:
        v = torch.cat([v, on.expand(-1, -1, v.shape[2], -1)], -1)
    y, parts["sums"] = additive(
        q.flatten(2, 3), k, v, log_decay(cell, call, stream), initial_state=parts["sums"].contiguous(), output_final_state=True,
        feature_map=cell.rows.feature_map.fused,
    )  # fmt: skip
    y = y.unflatten(2, q.shape[2:4])
    return Sums(y[..., :V], y[..., V] if cell.has_total else None), 0.0


def _scan(cell, call: AttentionCall, stream: Stream, given: tuple[Tensor, ...], parts: Parts) -> Tensor:
    y, parts["sums"] = _additive(*given, parts["sums"].contiguous())
    return y


def _levels(cell, call: AttentionCall, stream: Stream, given: tuple[Tensor, ...], parts: Parts, beta: Tensor | None = None) -> Tensor:
    """beta: of the delta rule. In training all rows start with nothing written, so the first written token stands at the same place in all of them."""
    weight = cell.levels(call.hidden_BTD)
    if call.state is not None:
        on, states, written = stream.on_BT, parts["sums"], parts["written"].long()
        place = together(on, written)
        if place is None:
            y, parts["sums"], written = read_steps(*given, weight, on, states, written, beta)
        else:
            y, parts["sums"], written = read_block(*given, weight, on, states, place, beta)
        parts["written"] = written.float()
        return y
    q, k, v, decay = given
    first = cell.window + cell.sinks if cell.rows.combine.older else 0
    y = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype, device=q.device)
    if q.shape[1] > first:
        *sums, decay, weight = (None if x is None else x[:, first:] for x in (q, k, v, decay, weight))
        rest = read_all(*sums, decay, weight) if beta is None else read_all_delta(*sums, beta[:, first:], decay, weight)
        y = torch.cat([y[:, :first], rest], 1)
    return y


def read_levels(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    return read_additive(cell, call, stream, now, parts, _levels)


# --- states that correct themselves, or fade by channel --------------------------------------------------------------------------------------


def read_delta(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    q, k, v = _plain(cell, call, stream, now, parts)
    y, parts["sums"] = _delta(q, k, v, _beta(stream), log_decay(cell, call, stream), parts["sums"])
    return Sums(y), 0.0


def read_delta_levels(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    given = (*_plain(cell, call, stream, now, parts), log_decay(cell, call, stream))
    return Sums(_levels(cell, call, stream, given, parts, _beta(stream))), 0.0


def read_momentum(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    q, k, v = _plain(cell, call, stream, now, parts)
    eta, decay = stream.kept["eta"].squeeze(-1), log_decay(cell, call, stream)
    y, parts["sums"], parts["momentum"] = momentum_steps(q, k, v, _beta(stream), eta, decay, stream.on_BT, parts["sums"], parts["momentum"])
    return Sums(y), 0.0


def read_selective(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    q, k, v = _plain(cell, call, stream, now, parts)
    y, parts["sums"] = selective_steps(q, k, v, stream.kept["dt"], cell.log_a.float().exp(), stream.on_BT, parts["sums"])
    return Sums(y), 0.0


def _plain(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys without a scale of their own, and the values."""
    return query_features(cell, call, stream.q_position_BT, now)[0], key_features(cell, stream, parts)[0], stream.v.float()


def _beta(stream: Stream) -> Tensor:
    return stream.kept["beta"].squeeze(-1) * stream.on_BT.unsqueeze(-1)


# --- slots ------------------------------------------------------------------------------------------------------------------------------------


def read_gated_slots(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    log_f, write = gated_slots(stream.kept["slot"], stream.on_BT)
    return _read_slots(cell, call, stream, parts, write, log_f)


def read_softmax_slots(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    write, total = softmax_slots(stream.kept["slot"], stream.on_BT, parts["total"])
    parts["total"] = total[:, -1]
    return _read_slots(cell, call, stream, parts, write, None, total.clamp_min(LEAST).unsqueeze(3))


def read_written_slots(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    write, log = slot_writes(stream.kept["slot"], stream.on_BT) * stream.kept.get("strength", 1.0), _slot_fade(cell, call, stream)
    total, parts["total"] = slot_totals(write, log, parts["total"])
    return _read_slots(cell, call, stream, parts, write, log, total.clamp_min(LEAST).unsqueeze(3))


def read_delta_slots(cell, call: AttentionCall, stream: Stream, now: Parts, parts: Parts) -> Read:
    s, beta, log = unit_writes(stream.kept["slot"], stream.on_BT), _beta(stream), log_decay(cell, call, stream)
    k = corrected(stream.kept.get("plain", stream.k).float(), s, beta, log, parts["sums"])
    logits, parts["sums"] = slot_logits(cell.queries(call), k, s, _slot_fade(cell, call, stream), parts["sums"])
    weights, total, log_scale = softmax_parts(logits * call.scale)
    y, parts["values"] = _delta(weights, s, stream.v.float(), beta, log, parts["values"])
    return Sums(y, total), log_scale


def _slot_fade(cell, call: AttentionCall, stream: Stream) -> Tensor | None:
    """[B, T, G, M]: log decay of the slots."""
    log = log_decay(cell, call, stream)
    if log is None:
        return None
    log = log if log.dim() == 4 else log.unsqueeze(-1)
    return log.expand(*log.shape[:3], stream.kept["slot"].shape[-1])


def _read_slots(
    cell, call: AttentionCall, stream: Stream, parts: Parts, write_BTGM: Tensor, log_f: Tensor | None, total_BTG1M: Tensor | None = None
) -> Read:
    """Keys of the slots, a softmax over them, their values; slots that hold sums are divided by `total`."""
    logits, parts["sums"] = slot_logits(cell.queries(call), stream.kept.get("plain", stream.k), write_BTGM, log_f, parts["sums"])
    logits = logits if total_BTG1M is None else logits / total_BTG1M
    weights, total, log_scale = softmax_parts(logits * call.scale)
    weights = weights if total_BTG1M is None else weights / total_BTG1M
    y, parts["values"] = _additive(weights, write_BTGM, stream.v.float(), log_f, parts["values"])
    return Sums(y, total), log_scale


READS = {
    "additive": read_additive,
    "levels": read_levels,
    "delta": read_delta,
    "delta_levels": read_delta_levels,
    "momentum": read_momentum,
    "selective": read_selective,
    "gated_slots": read_gated_slots,
    "softmax_slots": read_softmax_slots,
    "slots": read_written_slots,
    "delta_slots": read_delta_slots,
}


def _plus(decay: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if decay is None or shift is None:
        return shift if decay is None else decay
    return decay + (shift.unsqueeze(-1) if decay.dim() == 4 else shift)


def _additive(q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, log: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """(y [B, T, G, R, V], state after) of op `additive`, which counts query heads in one dimension, or of its step."""
    if one_token(q_BTGRF):
        now = (x[:, 0] for x in (q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV))
        y = additive_step(*now, state := state.contiguous(), None if log is None else log[:, 0])
        return y.view(y.shape[0], 1, *q_BTGRF.shape[2:4], -1), state
    y, state = additive(q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV, log, initial_state=state, output_final_state=True)
    return y.unflatten(2, q_BTGRF.shape[2:4]), state


def _delta(q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, beta_BTG: Tensor, log: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same of op `delta`."""
    if one_token(q_BTGRF):
        now = (x[:, 0] for x in (q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV, beta_BTG))
        y = delta_step(*now, state := state.contiguous(), None if log is None else log[:, 0])
        return y.view(y.shape[0], 1, *q_BTGRF.shape[2:4], -1), state
    y, state = delta(q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV, beta_BTG, log, initial_state=state, output_final_state=True)
    return y.unflatten(2, q_BTGRF.shape[2:4]), state
