"""The contract between the seam and a mixer.

Key: B batch, T tokens of this call, D model size, H query heads, G key/value heads, R = H / G query heads per key/value head (query head h
belongs to key/value head h // R), K key size, V value size.
"""

from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from subquad.linearize.state import MixerState


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the heads a mixer replaces."""

    hidden: int
    kv_heads: int
    groups: int  # query heads per key/value head
    key: int
    value: int


@dataclass
class AttentionCall:
    """One call at the seam. q, k, v are what the teacher computed: projected, normed and rotated. Real tokens come first in every row."""

    q_BTGRK: Tensor
    k_BTGK: Tensor
    v_BTGV: Tensor
    hidden_BTD: Tensor
    scale: float
    real_BT: Tensor | None = None  # None: every token is real
    fewest: int = 0  # real tokens in the poorest row of this call
    state: MixerState | None = None  # None in training; read and updated in place
    softcap: float | None = None
    sink_logit_GR: Tensor | None = None  # learned sinks of the teacher (gpt-oss `s_aux`)
    plain_q_BTGRK: Tensor | None = None  # before the teacher's rotation; None where it does not rotate, or the mixer does not ask
    plain_k_BTGK: Tensor | None = None
    causal: bool = True
    calibrating: bool = False  # set start values that depend on text (modes.calibrate), for which these two are given:
    exact_BTGRV: Tensor | None = None  # the teacher's output
    reach: int | None = None  # of the teacher's own sliding window


class Mixer(nn.Module):
    """Maps an AttentionCall to o_BTGRV in the dtype of v. Subclasses set `parameters` in __init__ and compute fp32 statistics."""

    plain = False  # asks for q and k before the teacher's rotation

    def __init__(self, shape: HeadShape, window: int, sinks: int):
        super().__init__()
        self.shape, self.window, self.sinks = shape, window, sinks

    def forward(self, call: AttentionCall) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")  # every row of MIXERS overrides this

    @classmethod
    def memory_bytes(cls, shape: HeadShape, **pieces) -> int:
        """Bytes of the recurrent state per sequence; window and sinks are counted by `kept_tokens`."""
        return 0

    @classmethod
    def kept_tokens(cls, tokens: int, window: int, sinks: int, **pieces) -> tuple[int, int]:
        """(tokens of the window, sinks) whose keys and values are kept after `tokens` tokens."""
        return min(tokens, window), sinks

    @classmethod
    def misfit(cls, shape: HeadShape, **pieces) -> str:
        """Why heads of this shape cannot have it; nothing if they can."""
        return ""

    @classmethod
    def extra_size(cls, shape: HeadShape, **pieces) -> int:
        """Numbers (fp32) per token of the window and key/value head that are kept with it (gates)."""
        return 0
