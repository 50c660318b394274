"""The cell: a window with sinks, plus linear attention of everything older, made of pieces (SEEDS 3.1, 3.2).

    tokens older than the window -> feature map, positions -> key weight -> decay, write -> read -> normaliser, output -> combine

or with the window behind it: all tokens -> the same -> added to the values -> window (combine.py, sequential).

A file per knob with a table, a row per choice (knobs.py joins them); presets (presets.py) name the rows. This file knows no row by its name.
Key: as in base.py; F features of a head, M slots, P partitions.
"""

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.bidirectional import whole_sequence
from subquad.linearize.mixers.calibration import fit_before, fit_joint, fit_mix
from subquad.linearize.mixers.combine import COMBINE_GATES, COMBINES, asked_once, join, some_older
from subquad.linearize.mixers.feature_maps import make_map
from subquad.linearize.mixers.knobs import DEFAULTS, map_options, rows_of
from subquad.linearize.mixers.local import Local, local_attention, plain_position, window_attention
from subquad.linearize.mixers.memory import base_features, close_parts, has_total, kept_sizes, open_parts, part_shapes
from subquad.linearize.mixers.normalisers import Normaliser, Sums
from subquad.linearize.mixers.one_pass import fits, in_one_pass
from subquad.linearize.mixers.positions import Phases
from subquad.linearize.mixers.reads import READS
from subquad.linearize.mixers.sparse_cache import through_cache
from subquad.linearize.mixers.stream import Stream, count, leaving, pack_kept, positions, real, seen, whole
from subquad.linearize.mixers.writes import WRITE_GATES


class Cell(Mixer):
    """Options: each a knob of SEEDS 3.2, a row of the table in the file of that name, or a number.

    mass: the starting share of the linear branch, as a logit (gated, added) or as a log weight (joint). rank: of low-rank gates. features: of maps
    that can have any number (0: their own). horizon: longest distance of the cosine map. slots; partitions, top: how many there are, how many a
    token uses. cache: pairs that stay exact between window and state, 0 for none (sparse_cache.py). fit_share, fit_map, fit_concentration, fit_decay:
    what is set from the teacher's layer before training (calibration.py).
    """

    def __init__(self, shape: HeadShape, window: int, sinks: int, **given):
        super().__init__(shape, window, sinks)
        p = self.pieces = {**DEFAULTS, **given}
        rows = self.rows = rows_of(p)
        self.asking = replace(shape, groups=1) if rows.combine.first else shape  # the queries that the state answers
        self.plain, self.one_pass, self.has_total = rows.position.plain, fits(p), has_total(p)
        self.kept_sizes, self.part_shapes = kept_sizes(shape, p), part_shapes(shape, p)
        self.early = rows.key_weight.rule is not None or rows.position.phases > 0  # remembers tokens before they leave the window
        self.read = READS[rows.container.reads.get(rows.write.read, rows.write.read)]
        self._make_features(p)
        self._make_state(p)
        self._make_output(p)

    # --- parameters; their names are those of saved students ---------------------------------------------------------------------------

    def _make_features(self, p: dict) -> None:
        if self.rows.container.slots:
            return
        G, R, K = self.asking.kv_heads, self.asking.groups, self.asking.key
        self.map_q = make_map(p["feature_map"], "q", (G, R), K, map_options(p))
        self.map_k = make_map(p["feature_map"], "k", (G,), K, map_options(p))
        if hasattr(self.map_q, "tie"):
            self.map_q.tie(self.map_k)

    def _make_state(self, p: dict) -> None:
        rows, shape, base = self.rows, self.asking, base_features(self.shape, p)
        self.decay = None if rows.decay.module is None else rows.decay.module(shape, base, p["rank"])
        for name in rows.write.gates:
            setattr(self, name, WRITE_GATES[name].make(shape, p["rank"]))
        for name, start in rows.write.own:
            setattr(self, name, nn.Parameter(start(shape, base)))
        if rows.container.gate is not None:
            setattr(self, rows.container.name, rows.container.gate(shape, p))
        if rows.position.phases:
            self.phases = Phases(shape, base // rows.position.phases, p["rank"], ladder=rows.position.phases == 2)

    def _make_output(self, p: dict) -> None:
        rows, shape = self.rows, self.asking
        if rows.combine.gate:
            setattr(self, rows.combine.gate, COMBINE_GATES[rows.combine.gate](self.shape, p["mass"]))
        # A state that corrects itself holds values as they are: nothing to divide by, but reads have a size of their own.
        bare = rows.write.corrects and not rows.container.slots
        if not rows.combine.joint:
            self.normalise = Normaliser("none" if bare else p["normaliser"], shape)
            self.output = None if rows.output.module is None else rows.output.module(shape, p["rank"])
        self.read_scale = nn.Parameter(torch.ones(shape.kv_heads, shape.groups)) if bare and rows.output.module is None else None

    # --- a call ------------------------------------------------------------------------------------------------------------------------

    def forward(self, call: AttentionCall) -> Tensor:
        if not call.causal:
            return whole_sequence(self, call).to(call.v_BTGV.dtype)
        if self.one_pass and not call.calibrating:
            place = plain_position(call)
            if place is not None:
                return in_one_pass(self, call, place)
        if call.calibrating and not self.rows.combine.first:
            fit_before(self, call)
        before = call.state.memory if call.state is not None else None
        parts = open_parts(before, self.part_shapes, call.k_BTGK)
        position = positions(call, seen(call))
        if self.rows.combine.first:
            return self.in_sequence(call, position, parts)
        kept, now = self.own_step(call, position, parts)
        local = None
        if self.rows.combine.window:
            local = local_attention(call, self.window, self.sinks, pack_kept(kept))
            if local.left_k is None:
                if call.state is not None and (before is not None or self.early):
                    call.state.memory = close_parts(parts)
                return local.output().to(call.v_BTGV.dtype)
            if self.pieces["cache"]:
                local = through_cache(call, local, parts)
            stream = leaving(local, self.kept_sizes, position, self.window)
        else:
            stream = whole(call, kept, position)
            count(call)
        out = self.joined(call, local, stream, now, parts)
        if call.state is not None:
            call.state.memory = close_parts(parts)
        return out.to(call.v_BTGV.dtype)

    def in_sequence(self, call: AttentionCall, position: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The window over values that what the state answers has been added to."""
        one = asked_once(call)
        kept, now = self.own_step(one, position, parts)
        linear = self.finished(self.read(self, one, whole(one, kept, position), now, parts)[0], call)
        share = torch.sigmoid(self.enrich(call.hidden_BTD)).unsqueeze(-1)
        value = (call.v_BTGV.float() + share * linear.squeeze(3)).to(call.v_BTGV.dtype)
        if call.state is not None:
            call.state.memory = close_parts(parts)
        return window_attention(replace(call, v_BTGV=value), self.window, self.sinks).to(value.dtype)

    def own_step(self, call: AttentionCall, position: Tensor, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(kept with the tokens of this call until they are written, what their queries need now): name -> [B, T, G, *], in the order of
        `kept_sizes`. Updates the running sums in `parts`."""
        kept: dict[str, Tensor] = {}
        now: dict[str, Tensor] = {}
        rows, hidden, on = self.rows, call.hidden_BTD, real(call)
        for name in rows.write.gates:
            kept[name] = WRITE_GATES[name].fn(getattr(self, name)(hidden))
        if rows.decay.kept:
            log = self.decay(hidden)
            kept["decay"] = log if rows.decay.vector else log.unsqueeze(-1)
        if rows.write.strength is not None:
            kept["strength"] = rows.write.strength(self.decay, hidden)
        if rows.key_weight.rule is not None:
            q, k = self.map_q(self.asked(call), position), self.map_k(self.keys(call), position)
            kept |= rows.key_weight.rule.so_far(q, k, self.keys(call).float(), on.float(), parts)
        if rows.position.phases:
            kept["phase"] = now["phase"] = self.phases(hidden, on.float(), parts["phase"])
            parts["phase"] = kept["phase"][:, -1]
        if rows.container.kept:
            kept[rows.container.kept] = now[rows.container.kept] = getattr(self, rows.container.name)(hidden)
        if self.plain:
            kept["plain"] = self.keys(call).float()
        return kept, now

    def queries(self, call: AttentionCall) -> Tensor:
        return call.plain_q_BTGRK if self.plain and call.plain_q_BTGRK is not None else call.q_BTGRK

    def asked(self, call: AttentionCall) -> Tensor:
        """`queries` as the map of queries takes them: maps that split q.k / sqrt(K) over both sides get the rest of the teacher's own scale."""
        q = self.queries(call)
        rest = call.scale * q.shape[-1] ** 0.5 if self.rows.feature_map.tempered else 1.0
        return q if abs(rest - 1) < 1e-6 else q * rest

    def keys(self, call: AttentionCall) -> Tensor:
        return call.plain_k_BTGK if self.plain and call.plain_k_BTGK is not None else call.k_BTGK

    def joined(self, call: AttentionCall, local: Local | None, stream: Stream, now: dict[str, Tensor], parts: dict[str, Tensor]) -> Tensor:
        """What the state answers, normalised and mixed with the window; fp32."""
        row = self.rows.combine
        sums, log_scale = self.read(self, call, stream, now, parts)
        if row.joint:
            if call.calibrating:
                fit_joint(self, call, local, stream, sums, log_scale)
            share = row.share(self, call, local, sums.total, log_scale)
            return join(local, stream.on_BT, sums.y, sums.total, share + log_scale)
        linear = self.finished(sums, call)
        if local is None:
            return linear
        if call.calibrating:
            fit_mix(self, call, local.output(), linear, stream.on_BT)
        share = (torch.sigmoid(self.mix(call.hidden_BTD)) * some_older(stream.on_BT)).unsqueeze(-1)
        return row.mix(local.output(), linear, share)

    def finished(self, sums: Sums, call: AttentionCall) -> Tensor:
        """What the state answers, through normaliser and output: [B, T, G, R, V]."""
        linear = self.normalise(sums)
        if self.output is not None:
            linear = self.output(linear, call.hidden_BTD)
        return linear if self.read_scale is None else linear * self.read_scale.float().unsqueeze(-1)

    @property
    def size(self) -> nn.Parameter | None:
        """The parameter [G, R, ..] that multiplies the linear branch."""
        return self.read_scale if self.read_scale is not None or self.output is None else self.output.size

    # --- sizes -------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def memory_bytes(cls, shape: HeadShape, **pieces) -> int:
        return 4 * sum(torch.Size(size).numel() for size in part_shapes(shape, {**DEFAULTS, **pieces}).values())

    @classmethod
    def misfit(cls, shape: HeadShape, **pieces) -> str:
        p = {**DEFAULTS, **pieces}
        features, phases = base_features(shape, p), rows_of(p).position.phases
        made = f"feature_map {p['feature_map']} makes {features} features of a key of {shape.key} numbers"
        if features < 1:
            return f"{made}: raise options.features."
        return f"position {p['position']} turns pairs of features, and {made}." if phases and features % phases else ""

    @classmethod
    def extra_size(cls, shape: HeadShape, **pieces) -> int:
        p = {**DEFAULTS, **pieces}
        return sum(kept_sizes(shape, p).values()) if COMBINES[p["combine"]].older else 0  # written at once, nothing has to wait

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, **pieces) -> tuple[int, int]:
        row = COMBINES[{**DEFAULTS, **pieces}["combine"]]
        return (min(tokens, window), sinks) if row.window else (0, 0)
