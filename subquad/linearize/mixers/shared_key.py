"""`shared_key`: sinks and a sliding window with one key for all heads and a value per key/value head (Rodimus+ SW-SKA, SEEDS C08)."""

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, HeadShape, Mixer
from subquad.linearize.mixers.local import window_attention


class SharedKey(Mixer):
    """Window attention with k = sum_g p_g k_g, p learned, the heads' mean at the start. Queries and values stay per head."""

    def __init__(self, shape: HeadShape, window: int, sinks: int):
        super().__init__(shape, window, sinks)
        self.share = nn.Parameter(torch.full((shape.kv_heads,), 1.0 / shape.kv_heads))

    def forward(self, call: AttentionCall) -> Tensor:
        key = torch.einsum("btgk,g->btk", call.k_BTGK.float(), self.share.float()).to(call.k_BTGK.dtype)
        shared = replace(call, k_BTGK=key.unsqueeze(2).expand_as(call.k_BTGK))
        return window_attention(shared, self.window, self.sinks).to(call.v_BTGV.dtype)
