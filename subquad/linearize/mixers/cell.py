"""The cell: a window with sinks, plus linear attention of everything older, made of pieces.

    older tokens -> feature map -> decay -> write -> read -> combine with the window's softmax

Presets (presets.py) name the pieces. Key: as in base.py; F features.
"""

import torch
import torch.nn as nn
from torch import Tensor

from subquad.kernels import ops
from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, LearnedMap
from subquad.linearize.mixers.gates import InputGate, log_decay
from subquad.linearize.mixers.local import Local, extend, local_attention, one_token, plain_position, remember

TINY = torch.finfo(torch.float32).tiny


def _some_older(local: Local) -> Tensor:
    """[B, T, 1, 1] fp32: 0 as long as nothing has left the window, so that all of the output is the window's."""
    return local.left_BT[..., None, None].float()


class Cell(Mixer):
    """Options (each a knob of SEEDS 3.2):

    feature_map: a row of FEATURE_MAPS.  decay: none | scalar (per key/value head) | vector (per feature), from the layer input.
    write: additive | delta (beta = sigmoid(W x), stored with the window so that it belongs to the token that is written).
    combine: joint, one normaliser for window and linear branch, stabilised by their common maximum (SEEDS 0.2, exact form);
             gated, (1 - g) window + g linear with g = sigmoid(W x).
    mass: the starting share of the linear branch, as a logit (gated) or as a log weight (joint).
    """

    def __init__(
        self,
        shape: HeadShape,
        window: int,
        sinks: int,
        feature_map: str,
        decay: str = "none",
        write: str = "additive",
        combine: str = "joint",
        mass: float = -4.0,
        rank: int = 16,
    ):
        super().__init__(shape, window, sinks)
        self.write, self.combine, self.decay_kind = write, combine, decay
        G, R, K = shape.kv_heads, shape.groups, shape.key
        # q.k / sqrt(K) split evenly over both sides, so that W = identity gives features of the teacher's logit scale.
        scale = K**-0.25 if FEATURE_MAPS[feature_map].positive else 1.0
        self.map_q = LearnedMap(feature_map, (G, R), K, scale)
        self.map_k = LearnedMap(feature_map, (G,), K, scale)
        features = FEATURE_MAPS[feature_map].factor * K
        # sigmoid(4) / 16 of log decay: a half-life of about 600 tokens at the start.
        self.decay = {
            "none": lambda: None,
            "scalar": lambda: InputGate(shape.hidden, (G,), 4.0),
            "vector": lambda: InputGate(shape.hidden, (G, features), 4.0, rank),
        }[decay]()
        self.beta = InputGate(shape.hidden, (G, 1), 0.0) if write == "delta" else None
        self.mix = InputGate(shape.hidden, (G, R), mass)
        if write == "delta":
            self.read_scale = nn.Parameter(torch.ones(G, R))

    def forward(self, call: AttentionCall) -> Tensor:
        if self.write == "additive" and self.combine == "joint":
            position = plain_position(call)
            if position is not None:
                return self._joint(call, position)
        beta = None if self.beta is None else torch.sigmoid(self.beta(call.hidden_BTD))
        local = local_attention(call, self.window, self.sinks, beta)
        memory = call.state.memory if call.state is not None else None
        if local.left_k is None and memory is None:
            return local.output().to(call.v_BTGV.dtype)
        if local.left_k is None:
            raise AssertionError("a memory without tokens leaving: the window shrank")
        decay = None if self.decay is None else log_decay(self.decay(call.hidden_BTD))
        if decay is not None and call.real_BT is not None:
            decay = decay * call.real_BT.view(*call.real_BT.shape, *(1,) * (decay.dim() - 2))
        read = self._read_delta if self.write == "delta" else self._read_additive
        out, memory = read(call, local, decay, memory)
        if call.state is not None:
            call.state.memory = memory
        return out.to(call.v_BTGV.dtype)

    def _joint(self, call: AttentionCall, position: int) -> Tensor:
        """Window, sinks and linear branch in one pass; a decode step has its own."""
        slots, T, state = extend(call, self.sinks), call.k_BTGK.shape[1], call.state
        memory = state.memory if state is not None else None
        q = call.q_BTGRK.flatten(2, 3)
        older = slots.before + T > self.window  # something leaves the window in this call
        decay = None if self.decay is None or not older else log_decay(self.decay(call.hidden_BTD))
        step = state is not None and one_token(call) and position >= self.window + self.sinks and memory is not None
        if step:
            out = ops.window_linear_step(
                q[:, 0], slots.k[:, 1:], slots.v[:, 1:], self.map_q(call.q_BTGRK)[:, 0].flatten(1, 2), self.mix(call.hidden_BTD)[:, 0].flatten(1),
                memory, self.map_k(slots.k[:, :1])[:, 0], slots.v[:, 0], None if decay is None else decay[:, 0], scale=call.scale,
                sink_k_BNGK=slots.sink_k, sink_v_BNGV=slots.sink_v,
            ).unsqueeze(1)  # fmt: skip
        elif not older:
            numerator, denominator, _ = ops.banded(
                q, slots.k, slots.v, window=self.window, sinks=self.sinks, scale=call.scale, position=position, **slots.given_sinks(position)
            )
            out = numerator / denominator.unsqueeze(-1)
        else:
            out, memory = ops.window_linear(
                q, slots.k, slots.v, self.map_q(call.q_BTGRK).flatten(2, 3), self.map_k(slots.k), self.mix(call.hidden_BTD).flatten(2), decay,
                window=self.window, sinks=self.sinks, scale=call.scale, position=position, initial_state=memory,
                output_final_state=state is not None, **slots.given_sinks(position),
            )  # fmt: skip
        remember(call, slots, self.window)
        if state is not None:
            state.memory = memory
        return out.unflatten(2, call.q_BTGRK.shape[2:4]).to(call.v_BTGV.dtype)

    def _read_additive(self, call: AttentionCall, local: Local, decay: Tensor | None, memory: Tensor | None):
        weight = local.left_BT[..., None, None].float()
        keys = self.map_k(local.left_k) * weight
        values = torch.cat([local.left_v.float(), torch.ones_like(local.left_v[..., :1], dtype=torch.float32)], -1)
        q = self.map_q(call.q_BTGRK)
        y, memory = ops.additive(q.flatten(2, 3), keys, values, decay, initial_state=memory, output_final_state=call.state is not None)
        y = y.unflatten(2, q.shape[2:4])
        numerator, denominator = y[..., :-1], y[..., -1]
        mix = self.mix(call.hidden_BTD)
        if self.combine == "joint":
            # A branch without tokens must not set the maximum: the window's sums would underflow under it, or the product with its empty sums overflow.
            mix = mix.masked_fill(~local.left_BT[..., None, None], float("-inf"))
            top = torch.maximum(local.top, mix).detach()
            a, b = (local.top - top).exp(), (mix - top).exp()
            total = a * local.denominator + b * denominator
            return (a.unsqueeze(-1) * local.numerator + b.unsqueeze(-1) * numerator) / total.clamp_min(TINY).unsqueeze(-1), memory
        linear = numerator / denominator.clamp_min(1e-6).unsqueeze(-1)
        share = torch.sigmoid(mix) * _some_older(local)
        return torch.lerp(local.output(), linear, share.unsqueeze(-1)), memory

    def _read_delta(self, call: AttentionCall, local: Local, decay: Tensor | None, memory: Tensor | None):
        beta = local.left_extra.squeeze(-1) * local.left_BT.unsqueeze(-1)
        q, k = self.map_q(call.q_BTGRK), self.map_k(local.left_k)
        more = dict(initial_state=memory, output_final_state=call.state is not None, out_dtype=torch.float32)
        y, memory = ops.delta(q.flatten(2, 3), k, local.left_v, beta, decay, **more)
        y = y.unflatten(2, q.shape[2:4])
        share = torch.sigmoid(self.mix(call.hidden_BTD)) * _some_older(local)
        return local.output() * (1 - share).unsqueeze(-1) + y * (share * self.read_scale.float()).unsqueeze(-1), memory

    @classmethod
    def memory_bytes(cls, shape: HeadShape, feature_map: str, write: str = "additive", **options) -> int:
        features = FEATURE_MAPS[feature_map].factor * shape.key
        return shape.kv_heads * features * (shape.value + (write == "additive")) * 4

    @classmethod
    def extra_size(cls, write: str = "additive", **options) -> int:
        return int(write == "delta")
