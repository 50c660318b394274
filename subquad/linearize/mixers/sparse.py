"""Sparse attention of three branches (NSA) and sparse attention with dense corrections (Delta Attention); both keep all tokens (SEEDS D07, D09).

Key: as in full.py; N blocks, M anchors.
"""

import torch
from torch import Tensor

from subquad.kernels.banded import banded_blocks
from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.full import OPEN, SHUT, Everything, block_means, everything, scores, sink_share
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.key_weights import NOTHING

BLOCK = 128


class NativeSparse(Mixer):
    """g_c Attn(q, block means) + g_s Attn(q, the best blocks) + g_w Attn(q, the last `window` tokens), g = sigmoid(W x + b).

    Blocks of 64 tokens. Means: of blocks wholly in the past, keys and values alike. Best: the `top` blocks with the largest weight among the means,
    summed over the group's queries; the first, the own and the one before it are always in. Gates start at 0, 0, 1.
    """

    SIZE = 64

    def __init__(self, shape: HeadShape, window: int, sinks: int, top: int = 8):
        super().__init__(shape, window, sinks)
        self.top = top
        self.gate = InputGate(shape.hidden, (shape.kv_heads, shape.groups, 3), 0.0)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([SHUT, SHUT, OPEN]).repeat(shape.kv_heads * shape.groups))

    def forward(self, call: AttentionCall) -> Tensor:
        all_ = everything(call)
        gate = torch.sigmoid(self.gate(call.hidden_BTD)).unsqueeze(-1)
        T, out = call.q_BTGRK.shape[1], []
        for start in range(0, T, BLOCK):
            rows = slice(start, min(start + BLOCK, T))
            out.append(sum(gate[:, rows, :, :, i] * branch for i, branch in enumerate(self.branches(call, all_, rows))))
        return torch.cat(out, 1).to(call.v_BTGV.dtype)

    def branches(self, call: AttentionCall, all_: Everything, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        q, position = call.q_BTGRK[:, rows], all_.position_BT[:, rows]
        place, visible = all_.position_BX, all_.visible_BX
        apart = position[:, :, None] - place[:, None]
        causal = ((apart >= 0) & visible[:, None])[:, None, None]
        s = scores(call, q, all_.k)
        window = attend(s, causal & (apart < self.window)[:, None, None], all_.v, call)
        mean_k, _ = block_means(all_.k, place, visible, self.SIZE)
        mean_v, _ = block_means(all_.v, place, visible, self.SIZE)
        blocks, own = torch.arange(mean_k.shape[1], device=s.device), position // self.SIZE
        past = ((blocks + 1) * self.SIZE <= position[..., None])[:, None, None]  # [B, 1, 1, T, N]
        coarse = scores(call, q, mean_k)
        compressed = attend(coarse, past, mean_v, call)
        weight = (coarse.masked_fill(~past, NOTHING).softmax(-1) * past).sum(2)  # over the group's queries: [B, G, T, N]
        weight = weight.masked_fill((blocks > own[..., None])[:, None], NOTHING)
        always = ((blocks == 0) | (blocks == own[..., None]) | (blocks == own[..., None] - 1))[:, None]
        weight = weight.masked_fill(always & (weight > NOTHING), -NOTHING)
        kept = weight.topk(min(self.top, weight.shape[-1]), -1).indices
        chosen = torch.zeros_like(weight, dtype=torch.bool).scatter(-1, kept, True)
        index = (place.clamp_min(0) // self.SIZE)[:, None, None].expand(*chosen.shape[:3], -1)
        return compressed, attend(s, causal & chosen.gather(-1, index).unsqueeze(2), all_.v, call), window

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, **pieces) -> tuple[int, int]:
        return tokens, 0


def attend(s: Tensor, mask: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """softmax of the masked scores times v, 0 where a query sees nothing: [B, T, G, R, V] fp32."""
    s = s.masked_fill(~mask, NOTHING)
    weights = s.softmax(-1) * mask
    if call.sink_logit_GR is not None:
        weights = weights * sink_share(s, call.sink_logit_GR)
    return torch.einsum("bgrtx,bxgv->btgrv", weights, v.float())


class DeltaCorrection(Mixer):
    """window_t + (full_a - window_a), a the latest token at or before t whose position is a multiple of `stride` (Delta Attention; SEEDS D09).

    Window: sinks and the last `window` tokens. Only one query in `stride` pays for full attention. stride 1 is full attention.
    """

    def __init__(self, shape: HeadShape, window: int, sinks: int, stride: int = 16):
        super().__init__(shape, window, sinks)
        self.stride = stride

    def forward(self, call: AttentionCall) -> Tensor:
        all_ = everything(call)
        B, T = call.k_BTGK.shape[:2]
        window = self.window_attention(call, all_)
        first = -all_.position_BT[:, 0] % self.stride  # [B]: the first anchor of this call
        anchors = first[:, None] + self.stride * torch.arange(-(-T // self.stride), device=first.device)  # [B, M]
        inside = anchors < T
        if call.real_BT is not None:
            inside = inside & call.real_BT.gather(1, anchors.clamp_max(T - 1))
        index = anchors.clamp_max(T - 1)
        take = lambda x: x.gather(1, index[:, :, None, None, None].expand(-1, -1, *x.shape[2:]))  # noqa: E731
        apart = all_.position_BT.gather(1, index)[:, :, None] - all_.position_BX[:, None]
        mask = ((apart >= 0) & all_.visible_BX[:, None])[:, None, None]
        delta = attend(scores(call, take(call.q_BTGRK), all_.k), mask, all_.v, call) - take(window)  # [B, M, G, R, V]
        before = torch.zeros_like(delta[:, :1]) if call.state is None or call.state.memory is None else call.state.memory.unsqueeze(1)
        delta = torch.cat([before, torch.where(inside[..., None, None, None], delta, 0.0)], 1)
        which = (torch.arange(T, device=first.device) - first[:, None]).div(self.stride, rounding_mode="floor") + 1  # [B, T]
        which = torch.minimum(which.clamp_min(0), inside.sum(1, keepdim=True))
        if call.state is not None:
            last = torch.minimum(which, inside.sum(1, keepdim=True)).amax(1)
            call.state.memory = delta.gather(1, last[:, None, None, None, None].expand(-1, 1, *delta.shape[2:]))[:, 0]
        return (window + delta.gather(1, which[:, :, None, None, None].expand(-1, -1, *delta.shape[2:]))).to(call.v_BTGV.dtype)

    def window_attention(self, call: AttentionCall, all_: Everything) -> Tensor:
        sink_k = sink_v = sink_seen = None
        if self.sinks:
            before = all_.k.shape[1] - call.k_BTGK.shape[1]
            slot = before - all_.position_BT[:, :1] + torch.arange(self.sinks, device=all_.k.device)  # [B, N]
            index = slot.clamp(0, all_.k.shape[1] - 1)[:, :, None, None]
            sink_k, sink_v = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (all_.k, all_.v))
            sink_seen = all_.position_BT[..., None] - torch.arange(self.sinks, device=all_.k.device) >= self.window
        numerator, denominator, _ = banded_blocks(
            call.q_BTGRK, all_.k, all_.v, window=self.window, scale=call.scale, valid_BX=all_.visible_BX, softcap=call.softcap,
            sink_logit_GR=call.sink_logit_GR, sink_k=sink_k, sink_v=sink_v, sink_seen_BTN=sink_seen,
        )  # fmt: skip
        return numerator / denominator.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)

    @classmethod
    def memory_bytes(cls, shape: HeadShape, **pieces) -> int:
        return 4 * shape.kv_heads * shape.groups * shape.value

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, **pieces) -> tuple[int, int]:
        return tokens, 0
