"""Mixers of encoders only, which look at all tokens before they answer any: pooled agents (SEEDS A25), relative positions by FFT (SEEDS A22).

Key: as in base.py; M agents, F features.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.random_features import Favor
from subquad.linearize.mixers.stream import real


class Agent(Mixer):
    """softmax(q A^T / sqrt(K)) softmax(A k^T / sqrt(K)) v, A the means of the queries in `agents` equal stretches of the row, per query head.

    Without the published biases and depthwise convolution, which start at 0.
    """

    def __init__(self, shape: HeadShape, window: int, sinks: int, agents: int = 16):
        super().__init__(shape, window, sinks)
        self.agents = agents

    def forward(self, call: AttentionCall) -> Tensor:
        on, q = real(call), call.q_BTGRK.float()
        n = on.sum(1, keepdim=True).clamp_min(1)
        place = torch.arange(q.shape[1], device=q.device) * self.agents // n  # stretch of each token
        member = F.one_hot(place.clamp_max(self.agents - 1), self.agents).float() * on[..., None]  # [B, T, M]
        filled = member.sum(1)
        agents = torch.einsum("btm,btgrk->bmgrk", member, q) / filled.clamp_min(1)[..., None, None, None]
        collect = torch.einsum("bmgrk,btgk->bgrmt", agents, call.k_BTGK.float()) * call.scale
        collected = collect.masked_fill(~on[:, None, None, None], NOTHING).softmax(-1) @ call.v_BTGV.float().transpose(1, 2).unsqueeze(2)
        spread = torch.einsum("btgrk,bmgrk->bgrtm", q, agents) * call.scale
        spread = spread.masked_fill((filled == 0)[:, None, None, None], NOTHING).softmax(-1)  # short rows leave stretches empty
        return (spread @ collected).permute(0, 3, 1, 2, 4).to(call.v_BTGV.dtype)


class RelativeFavor(Mixer):
    """sum_j e^(b_(i-j)) phi(q_i).phi(k_j) v_j over the same without v, q and k of unit length, phi Performer's features; by FFT in O(T log T).

    b is learned per key/value head for distances up to `span`, beyond it stays at its last value; 0 at the start.
    """

    def __init__(self, shape: HeadShape, window: int, sinks: int, span: int = 128, features: int = 0):
        super().__init__(shape, window, sinks)
        self.span = span
        self.bias = nn.Parameter(torch.zeros(shape.kv_heads, 2 * span + 1))
        self.map = Favor("q", (shape.kv_heads,), shape.key, 1.0, features)

    def weights(self, T: int) -> Tensor:
        """e^(b_d) for d = -(T-1) .. T-1: [G, 2 T - 1]."""
        distance = torch.arange(-(T - 1), T, device=self.bias.device).clamp(-self.span, self.span) + self.span
        return self.bias.float()[:, distance].exp()

    def forward(self, call: AttentionCall) -> Tensor:
        on, T = real(call)[..., None, None], call.k_BTGK.shape[1]
        # Unit vectors: log features lie within |w| of each other, no maximum has to be taken out.
        q = self.map(F.normalize(call.q_BTGRK.float(), dim=-1)).exp()
        k = self.map(F.normalize(call.k_BTGK.float(), dim=-1)).exp().masked_fill(~on, 0.0)
        v = torch.cat([call.v_BTGV.float(), torch.ones_like(call.v_BTGV[..., :1], dtype=torch.float32)], -1).masked_fill(~on, 0.0)
        pairs = k.unsqueeze(-1) * v.unsqueeze(-2)  # [B, T, G, F, V + 1]
        size = 3 * T - 2
        kernel = torch.fft.rfft(self.weights(T), size, dim=1).T[None, :, :, None, None]
        spread = torch.fft.irfft(torch.fft.rfft(pairs, size, dim=1) * kernel, size, dim=1)[:, T - 1 : 2 * T - 1]
        y = torch.einsum("btgrf,btgfv->btgrv", q, spread)
        return (y[..., :-1] / y[..., -1:].clamp_min(1e-20)).to(call.v_BTGV.dtype)
