"""The cell: a window with sinks, plus linear attention of everything older, made of pieces.

    older tokens -> feature map -> decay -> write -> read -> combine with the window's softmax

Presets (presets.py) name the pieces. Key: as in base.py; F features.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from subquad.kernels.additive import additive_chunk
from subquad.kernels.delta import delta_chunk
from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, LearnedMap
from subquad.linearize.mixers.gates import InputGate, log_decay
from subquad.linearize.mixers.local import Local, local_attention

TINY = torch.finfo(torch.float32).tiny
START = 0.1  # share of the joint normaliser that `calibrate` gives the linear branch before any training


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
        self.calibrating = False  # set by modes.calibrate for one pass
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

    def _read_additive(self, call: AttentionCall, local: Local, decay: Tensor | None, memory: Tensor | None):
        weight = local.left_BT[..., None, None].float()
        keys = self.map_k(local.left_k) * weight
        values = torch.cat([local.left_v.float(), torch.ones_like(local.left_v[..., :1], dtype=torch.float32)], -1)
        y, memory = additive_chunk(self.map_q(call.q_BTGRK), keys, values, decay, memory)
        numerator, denominator = y[..., :-1], y[..., -1]
        if self.calibrating and self.combine == "joint":
            self._calibrate(local, denominator)
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

    @torch.no_grad()
    def _calibrate(self, local: Local, denominator: Tensor) -> None:
        """Set each query head's log weight so that the linear branch holds the share START of the normaliser, in the geometric mean over tokens.

        The window's log sum is 4 to 8 nats, differs by head, and an untrained map's sums lie far below it: from one constant for all heads the
        linear branch gets next to no gradient where it is needed most. A gate that has been trained (weight not zero) is left alone.
        """
        seen_BT = local.left_BT
        if bool(self.mix.weight.any()) or not bool(seen_BT.any()):
            return
        ratio_BTGR = local.top + local.denominator.clamp_min(TINY).log() - denominator.clamp_min(TINY).log()
        mean_GR = ratio_BTGR[seen_BT.expand(ratio_BTGR.shape[:2])].mean(0)
        self.mix.bias.copy_((mean_GR + math.log(START / (1 - START))).flatten())

    def _read_delta(self, call: AttentionCall, local: Local, decay: Tensor | None, memory: Tensor | None):
        beta = local.left_extra.squeeze(-1) * local.left_BT.unsqueeze(-1)
        y, memory = delta_chunk(self.map_q(call.q_BTGRK), self.map_k(local.left_k), local.left_v.float(), beta, decay, memory)
        share = torch.sigmoid(self.mix(call.hidden_BTD)) * _some_older(local)
        return local.output() * (1 - share).unsqueeze(-1) + y * (share * self.read_scale.float()).unsqueeze(-1), memory

    @classmethod
    def memory_bytes(cls, shape: HeadShape, feature_map: str, write: str = "additive", **options) -> int:
        features = FEATURE_MAPS[feature_map].factor * shape.key
        return shape.kv_heads * features * (shape.value + (write == "additive")) * 4

    @classmethod
    def extra_size(cls, write: str = "additive", **options) -> int:
        return int(write == "delta")
