"""The cell: a window with sinks, plus linear attention of everything older, made of pieces (SEEDS 3.1, 3.2).

    tokens older than the window -> feature map, positions -> key weight -> decay, write -> read -> normaliser, output -> combine

One file per knob, a row per choice; presets (presets.py) name the rows. Key: as in base.py; F features of a head, M slots, P partitions.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from subquad.kernels.ops import additive, banded, delta, window_linear, window_linear_step
from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.bidirectional import whole_sequence
from subquad.linearize.mixers.combine import COMBINES, TINY, join, some_older
from subquad.linearize.mixers.decays import DECAYS, SMALL_STEP
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, make_map
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.key_weights import KEY_WEIGHTS, NOTHING, running
from subquad.linearize.mixers.levels import LevelWeights, read_all, read_steps
from subquad.linearize.mixers.local import Local, extend, local_attention, one_token, plain_position, remember_slots
from subquad.linearize.mixers.memory import base_features, close_parts, has_total, kept_sizes, open_parts, part_shapes
from subquad.linearize.mixers.normalisers import EPS, NORMALISERS, Normaliser, Sums
from subquad.linearize.mixers.outputs import OUTPUTS
from subquad.linearize.mixers.partitions import Routes, routed
from subquad.linearize.mixers.positions import POSITIONS, Phases, turned
from subquad.linearize.mixers.slots import gated_slots, slot_gate, slot_logits, softmax_parts, softmax_slots
from subquad.linearize.mixers.steps import momentum_steps, selective_steps
from subquad.linearize.mixers.stream import Stream, count, leaving, pack_kept, positions, real, seen, whole
from subquad.linearize.mixers.writes import WRITES, complement, strength

START = 0.1  # share of the joint normaliser that `calibrate` gives the linear branch before any training

# The pieces a preset may leave out.
DEFAULTS = dict(
    feature_map="identity", decay="none", write="additive", normaliser="sum", key_weight="none", position="keep", output="none", container="plain",
    combine="joint", mass=-4.0, rank=16, features=0, horizon=8192, slots=64, partitions=4, top=2,
)  # fmt: skip


class Cell(Mixer):
    """Options: each a knob of SEEDS 3.2, a row of the table in the file of that name.

    feature_map, decay, write, normaliser, key_weight, position, output, combine; container: plain | gated_slots | softmax_slots | partitions | levels.
    mass: the starting share of the linear branch, as a logit (gated, added) or as a log weight (joint). rank: of low-rank gates. features: of maps
    that can have any number (0: their own). horizon: longest distance of the cosine map. slots; partitions, top: how many there are, how many a
    token uses.
    """

    def __init__(self, shape: HeadShape, window: int, sinks: int, **given):
        super().__init__(shape, window, sinks)
        p = self.pieces = {**DEFAULTS, **given}
        self.write, self.combine, self.container = p["write"], p["combine"], p["container"]
        self.decay_row, self.position_row, self.combine_row = DECAYS[p["decay"]], POSITIONS[p["position"]], COMBINES[p["combine"]]
        self.map_row, self.norm_row = FEATURE_MAPS[p["feature_map"]], NORMALISERS[p["normaliser"]]
        self.plain = self.position_row.plain
        # One op does all of it: window, sinks and plain sums of features under one normaliser, decays from the layer input of the reading token.
        self.one_pass = (
            self.combine == "joint"
            and p["write"] == "additive"
            and p["container"] == "plain"
            and (p["normaliser"], p["key_weight"], p["position"]) == ("sum", "none", "keep")
            and not self.map_row.exponential
            and (self.decay_row.module is None or self.decay_row.clock == "now")
        )
        G, R, K = shape.kv_heads, shape.groups, shape.key
        self.kept_sizes, self.part_shapes = kept_sizes(shape, p), part_shapes(shape, p)
        self.slotted = self.container.endswith("slots")
        self.early = p["key_weight"] != "none" or self.position_row.phases > 0  # remembers tokens before they leave the window
        options = dict(features=p["features"], horizon=p["horizon"])
        if not self.slotted:
            self.map_q, self.map_k = make_map(p["feature_map"], "q", (G, R), K, options), make_map(p["feature_map"], "k", (G,), K, options)
            if hasattr(self.map_q, "tie"):
                self.map_q.tie(self.map_k)
        base = base_features(shape, p)
        self.decay = None if self.decay_row.module is None else self.decay_row.module(shape, base, p["rank"])
        self.beta = InputGate(shape.hidden, (G, 1), 0.0) if WRITES[self.write].corrects else None
        if self.write == "momentum":
            self.eta = InputGate(shape.hidden, (G, 1), 0.0)
        if self.write == "selective":
            self.dt = InputGate(shape.hidden, (G, shape.value), SMALL_STEP, p["rank"])
            # A = 1 .. F as in S4D-real, for every value channel.
            self.log_a = nn.Parameter(torch.arange(1, base + 1).float().log()[None, :, None].repeat(G, 1, shape.value))
        self.slot = slot_gate(shape, p["slots"]) if self.slotted else None
        self.routes = Routes(shape, p["partitions"], p["top"]) if self.container == "partitions" else None
        self.levels = LevelWeights(shape) if self.container == "levels" else None
        if self.position_row.phases:
            self.phases = Phases(shape, base // self.position_row.phases, p["rank"], ladder=self.position_row.phases == 2)
        if self.combine_row.gate == "token":
            self.mix = InputGate(shape.hidden, (G, R), p["mass"])
        elif self.combine_row.gate == "head":
            self.factor = nn.Parameter(torch.full((G, R), -2.197))  # a tenth, as published
        if not self.combine_row.joint:
            bare = WRITES[self.write].corrects  # the state holds values as they are: nothing to divide by
            self.normalise = Normaliser("none" if bare else p["normaliser"], shape)
            self.output = None if OUTPUTS[p["output"]].module is None else OUTPUTS[p["output"]].module(shape, p["rank"])
        if WRITES[self.write].corrects and p["output"] == "none":
            self.read_scale = nn.Parameter(torch.ones(G, R))

    def forward(self, call: AttentionCall) -> Tensor:
        if not call.causal:
            return whole_sequence(self, call).to(call.v_BTGV.dtype)
        if self.one_pass and not call.calibrating:
            place = plain_position(call)
            if place is not None:
                return self.in_one_pass(call, place)
        before = call.state.memory if call.state is not None else None
        parts = open_parts(before, self.part_shapes, call.k_BTGK)
        position = positions(call, seen(call))
        kept, now = self.own_step(call, position, parts)
        local = None
        if self.combine_row.window:
            local = local_attention(call, self.window, self.sinks, pack_kept(kept))
            if local.left_k is None:
                if call.state is not None and (before is not None or self.early):
                    call.state.memory = close_parts(parts)
                return local.output().to(call.v_BTGV.dtype)
            stream = leaving(local, self.kept_sizes, position, self.window)
        else:
            stream = whole(call, kept, position)
            count(call)
        out = self.joined(call, local, stream, now, parts)
        if call.state is not None:
            call.state.memory = close_parts(parts)
        return out.to(call.v_BTGV.dtype)

    def in_one_pass(self, call: AttentionCall, position: int) -> Tensor:
        """Window, sinks and linear branch by one op; a decode step has its own. `position`: the tokens that came before this call."""
        slots, T, state = extend(call, self.sinks), call.k_BTGK.shape[1], call.state
        memory = state.memory if state is not None else None
        q = call.q_BTGRK.flatten(2, 3)
        older = slots.before + T > self.window  # something leaves the window in this call
        places = torch.arange(-slots.before, T, device=q.device).expand(q.shape[0], -1) + position
        now = places[:, slots.before :]
        decay = None
        if older and self.decay is not None:
            decay = self.decay(call.hidden_BTD)
            if call.real_BT is not None:
                decay = decay.masked_fill(~call.real_BT.view(*call.real_BT.shape, *(1,) * (decay.dim() - 2)), 0.0)
        if state is not None and one_token(call) and position >= self.window + self.sinks and memory is not None:
            out = window_linear_step(
                q[:, 0], slots.k[:, 1:], slots.v[:, 1:], self.map_q(call.q_BTGRK, now)[:, 0].flatten(1, 2),
                self.mix(call.hidden_BTD)[:, 0].flatten(1), memory, self.map_k(slots.k[:, :1], places[:, :1])[:, 0], slots.v[:, 0],
                None if decay is None else decay[:, 0], scale=call.scale, sink_k_BNGK=slots.sink_k, sink_v_BNGV=slots.sink_v,
            ).unsqueeze(1)  # fmt: skip
        elif older:
            out, memory = window_linear(
                q, slots.k, slots.v, self.map_q(call.q_BTGRK, now).flatten(2, 3), self.map_k(slots.k, places), self.mix(call.hidden_BTD).flatten(2),
                decay, window=self.window, sinks=self.sinks, scale=call.scale, position=position, initial_state=memory,
                output_final_state=state is not None, **slots.given_sinks(position),
            )  # fmt: skip
        else:
            given = slots.given_sinks(position)
            numerator, denominator, _ = banded(
                q, slots.k, slots.v, window=self.window, sinks=self.sinks, scale=call.scale, position=position, **given
            )
            out = numerator / denominator.unsqueeze(-1)
        remember_slots(call, slots, self.window)
        if state is not None:
            state.memory = memory
        return out.unflatten(2, call.q_BTGRK.shape[2:4]).to(call.v_BTGV.dtype)

    # --- a token's own step: what is kept with it until it is written -----------------------------------------------------------------

    def own_step(self, call: AttentionCall, position: Tensor, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(kept with the tokens of this call, what their queries need now): name -> [B, T, G, *]. Updates the running sums in `parts`."""
        kept: dict[str, Tensor] = {}
        now: dict[str, Tensor] = {}
        hidden, on = call.hidden_BTD, real(call)
        if self.beta is not None:
            kept["beta"] = torch.sigmoid(self.beta(hidden))
        if self.write == "momentum":
            kept["eta"] = torch.sigmoid(self.eta(hidden))
        if self.write == "selective":
            kept["dt"] = nn.functional.softplus(self.dt(hidden))
        if self.decay is not None and self.decay_row.clock == "own" and self.decay_row.reads == "hidden":
            log = self.decay(hidden)
            kept["decay"] = log if self.decay_row.vector else log.unsqueeze(-1)
        strong = strength(self.write, self.decay, hidden)
        if strong is not None:
            kept["strength"] = strong
        if self.slot is not None:
            kept["slot"] = self.slot(hidden)
        weigh = KEY_WEIGHTS[self.pieces["key_weight"]]
        if weigh is not None:
            q, k = self.map_q(self.queries(call), position), self.map_k(self.keys(call), position)
            kept |= weigh.weigh(q, k, self.keys(call).float(), on.float(), parts)
        if self.position_row.phases:
            kept["phase"] = now["phase"] = self.phases(hidden, on.float(), parts["phase"])
            parts["phase"] = kept["phase"][:, -1]
        if self.routes is not None:
            kept["route"] = now["route"] = self.routes(hidden)
        if self.plain:
            kept["plain"] = self.keys(call).float()
        return kept, now

    def queries(self, call: AttentionCall) -> Tensor:
        return call.plain_q_BTGRK if self.plain and call.plain_q_BTGRK is not None else call.q_BTGRK

    def keys(self, call: AttentionCall) -> Tensor:
        return call.plain_k_BTGK if self.plain and call.plain_k_BTGK is not None else call.k_BTGK

    # --- features ---------------------------------------------------------------------------------------------------------------------

    def query_features(self, call: AttentionCall, position: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """(phi_q [B, T, G, R, F], log scale taken out of it)."""
        q, log_scale = self.map_q(self.queries(call), position), 0.0
        if "q" in self.map_row.exponential:
            top = q.amax(-1, keepdim=True).detach()
            q, log_scale = (q - top).exp(), top.squeeze(-1)
        if "phase" in now:
            q = turned(q, now["phase"].unsqueeze(3), self.position_row.doubles)
        return (routed(q, now["route"].unsqueeze(3)) if "route" in now else q), log_scale

    def key_features(self, stream: Stream, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """(phi_k [B, T, G, F], 0 where nothing is written; log decay that keeps its largest exponent in place; log scale taken out)."""
        kept, on = stream.kept, stream.on_BT[..., None, None]
        decay, log_scale = None, 0.0
        if self.write == "convex":
            k = complement(self.decay(stream.k))
        else:
            k = self.map_k(kept.get("plain", stream.k), stream.k_position_BT)
        if "k" in self.map_row.exponential:
            # The largest exponent so far is the unit of the state (SEEDS 0.14): where it grows, the state shrinks by as much.
            highest = k.detach().amax(-1).masked_fill(~stream.on_BT[..., None], NOTHING)
            tops = torch.cummax(torch.cat([parts["top"].unsqueeze(1), highest], 1), 1)[0]
            decay = (tops[:, :-1] - tops[:, 1:]).masked_fill(tops[:, :-1] <= NOTHING / 2, 0.0)
            k = (k - tops[:, 1:, :, None]).clamp_max(0.0).exp()
            log_scale, parts["top"] = tops[:, 1:, :, None], tops[:, -1]
        if "strength" in kept:
            k = k * kept["strength"]
        if "weight" in kept and self.pieces["normaliser"] != "flow":
            k = k * kept["weight"]
        if "phase" in kept:
            k = turned(k, kept["phase"], self.position_row.doubles)
        if "route" in kept:
            k = routed(k, kept["route"])
        return k.masked_fill(~on, 0.0), decay, log_scale

    def log_decay(self, call: AttentionCall, stream: Stream) -> Tensor | None:
        """[B, T, G] or [B, T, G, F]; 0 where no token goes by."""
        if self.decay is None:
            return None
        if self.decay_row.clock == "now":
            log, on = self.decay(call.hidden_BTD), call.real_BT
        else:
            log = self.decay(stream.k) if self.decay_row.reads == "key" else stream.kept["decay"]
            log, on = log if self.decay_row.vector else log.squeeze(-1), stream.on_BT
        if on is not None:
            log = log.masked_fill(~on.view(*on.shape, *(1,) * (log.dim() - 2)), 0.0)
        if self.decay_row.vector and self.position_row.doubles:
            log = torch.cat([log, log], -1)
        if self.decay_row.vector and self.routes is not None:
            log = log.repeat_interleave(self.pieces["partitions"], -1)
        return log

    # --- reads ------------------------------------------------------------------------------------------------------------------------

    def joined(self, call: AttentionCall, local: Local | None, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]) -> Tensor:
        read = self.read_slots if self.slotted else self.read_delta if self.beta is not None else self.read_additive
        if self.write == "selective":
            read = self.read_selective
        sums, log_scale = read(call, stream, now, parts)
        if self.combine_row.joint:
            share = torch.zeros_like(sums.total) if self.combine == "logits" else 0.0
            if self.combine == "joint":
                if call.calibrating:
                    self.calibrate(local, sums.total, log_scale)
                share = self.mix(call.hidden_BTD)
            elif self.combine == "joint_top":
                share = local.top - nn.functional.logsigmoid(self.factor.float())
            return join(local, stream.on_BT, sums.y, sums.total, share + log_scale)
        linear = self.normalise(sums)
        if self.output is not None:
            linear = self.output(linear, call.hidden_BTD)
        if self.beta is not None and self.pieces["output"] == "none":
            linear = linear * self.read_scale.float().unsqueeze(-1)
        if local is None:
            return linear
        share = (torch.sigmoid(self.mix(call.hidden_BTD)) * some_older(stream.on_BT)).unsqueeze(-1)
        return local.output() + share * linear if self.combine == "added" else torch.lerp(local.output(), linear, share)

    @torch.no_grad()
    def calibrate(self, local: Local, total_BTGR: Tensor, log_scale: Tensor | float) -> None:
        """Set each query head's log weight so that the linear branch holds the share START of the normaliser, in the geometric mean over tokens.

        The window's log sum is 4 to 8 nats, differs by head, and an untrained map's sums lie far below it: from one constant for all heads the
        linear branch gets next to no gradient where it is needed most. A gate that has been trained (weight not zero) is left alone.
        """
        seen_BT = local.left_BT
        if bool(self.mix.weight.any()) or not bool(seen_BT.any()):
            return
        ratio_BTGR = local.top + local.denominator.clamp_min(TINY).log() - total_BTGR.clamp_min(TINY).log() - log_scale
        mean_GR = ratio_BTGR[seen_BT.expand(ratio_BTGR.shape[:2])].mean(0)
        self.mix.bias.copy_((mean_GR + math.log(START / (1 - START))).flatten())

    def read_additive(self, call: AttentionCall, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]):
        V, on = self.shape.value, stream.on_BT[..., None, None].float()
        q, q_scale = self.query_features(call, stream.q_position_BT, now)
        k, shift, k_scale = self.key_features(stream, parts)
        decay = _plus(self.log_decay(call, stream), shift)
        v = stream.v.float() * on
        columns = [v * stream.kept["weight"] if self.pieces["normaliser"] == "flow" else v]
        if has_total(self.pieces):
            columns.append(torch.ones_like(v[..., :1]))
        if "outgoing" in stream.kept:
            columns.append(stream.kept["outgoing"])
        F, state = k.shape[-1], parts["sums"]
        if self.pieces["normaliser"] == "feature":
            q = q / running(k, state[:, :, :F, V]).clamp_min(TINY).unsqueeze(3)
        if self.levels is None:
            y, after = _additive(q, k, torch.cat(columns, -1), decay, state[:, :, :F].contiguous())
        else:
            y, after = self.read_levels(call, stream, q, k, torch.cat(columns, -1), decay, parts)
        sums = Sums(y[..., :V], y[..., V] if has_total(self.pieces) else None, eps=1e-30 if self.map_row.exponential else EPS)
        if self.norm_row.counts:
            row = state[:, :, F]
            sums.u, n = running(v, row[..., :V]), running(on[..., 0].expand(-1, -1, row.shape[1]), row[..., V])
            sums.n = n[:, :, 0]
            rest = row.new_zeros(*row.shape[:2], row.shape[2] - V - 1)
            after = torch.cat([after, torch.cat([sums.u[:, -1], n[:, -1, :, None], rest], -1).unsqueeze(2)], 2)
        if "outgoing" in stream.kept:
            sums.allocation = y[..., V + 1] / sums.n.clamp_min(1)[..., None, None]
        parts["sums"] = after
        return sums, q_scale + k_scale

    def read_levels(
        self, call: AttentionCall, stream: Stream, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, parts: dict[str, Tensor]
    ):
        """(y, states). In training all rows start with nothing written, so the first written token stands at the same place in all of them."""
        weight = self.levels(call.hidden_BTD)
        if call.state is None:
            first = self.window + self.sinks if self.combine_row.window else 0
            y = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype, device=q.device)
            if q.shape[1] > first:
                rest = read_all(*(x[:, first:] for x in (q, k, v)), None if decay is None else decay[:, first:], weight[:, first:])
                y = torch.cat([y[:, :first], rest], 1)
            return y, parts["sums"]
        y, states, written = read_steps(q, k, v, decay, weight, stream.on_BT, parts["sums"], parts["written"].long())
        parts["written"] = written.float()
        return y, states

    def read_delta(self, call: AttentionCall, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]):
        q, _ = self.query_features(call, stream.q_position_BT, now)
        k, _, _ = self.key_features(stream, parts)
        beta = stream.kept["beta"].squeeze(-1) * stream.on_BT.unsqueeze(-1)
        decay = self.log_decay(call, stream)
        if self.write == "momentum":
            eta = stream.kept["eta"].squeeze(-1)
            y, parts["sums"], parts["momentum"] = momentum_steps(
                q, k, stream.v.float(), beta, eta, decay, stream.on_BT, parts["sums"], parts["momentum"]
            )
        else:
            y, parts["sums"] = _delta(q, k, stream.v.float(), beta, decay, parts["sums"])
        return Sums(y), 0.0

    def read_selective(self, call: AttentionCall, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]):
        q, _ = self.query_features(call, stream.q_position_BT, now)
        k, _, _ = self.key_features(stream, parts)
        a = self.log_a.float().exp()
        y, parts["sums"] = selective_steps(q, k, stream.v.float(), stream.kept["dt"], a, stream.on_BT, parts["sums"])
        return Sums(y), 0.0

    def read_slots(self, call: AttentionCall, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]):
        total_BTGM, log_f = None, None
        if self.container == "gated_slots":
            log_f, write = gated_slots(stream.kept["slot"], stream.on_BT)
        else:
            write, total = softmax_slots(stream.kept["slot"], stream.on_BT, parts["total"])
            parts["total"], total_BTGM = total[:, -1], total.clamp_min(TINY).unsqueeze(3)
        keys = stream.kept.get("plain", stream.k)
        logits, parts["sums"] = slot_logits(self.queries(call), keys, write, log_f, parts["sums"])
        logits = logits if total_BTGM is None else logits / total_BTGM
        weights, total, log_scale = softmax_parts(logits * call.scale)
        weights = weights if total_BTGM is None else weights / total_BTGM
        y, parts["values"] = _additive(weights, write, stream.v.float(), log_f, parts["values"])
        return Sums(y, total), log_scale

    # --- sizes ------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def memory_bytes(cls, shape: HeadShape, **pieces) -> int:
        return 4 * sum(torch.Size(size).numel() for size in part_shapes(shape, {**DEFAULTS, **pieces}).values())

    @classmethod
    def extra_size(cls, shape: HeadShape, **pieces) -> int:
        return sum(kept_sizes(shape, {**DEFAULTS, **pieces}).values())

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, combine: str = "joint", **pieces) -> tuple[int, int]:
        return (min(tokens, window), sinks) if COMBINES[combine].window else (0, 0)


def _plus(decay: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if decay is None or shift is None:
        return shift if decay is None else decay
    return decay + (shift.unsqueeze(-1) if decay.dim() == 4 else shift)


def _additive(q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """(y [B, T, G, R, V], state after) of op `additive`, which counts query heads in one dimension."""
    y, state = additive(q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV, log_decay, initial_state=state, output_final_state=True)
    return y.unflatten(2, q_BTGRF.shape[2:4]), state


def _delta(
    q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, beta_BTG: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of op `delta`."""
    y, state = delta(q_BTGRF.flatten(2, 3), k_BTGF, v_BTGV, beta_BTG, log_decay, initial_state=state, output_final_state=True)
    return y.unflatten(2, q_BTGRF.shape[2:4]), state
