"""`window`: sinks and a sliding window, nothing trained (SEEDS C04, C05). The strong baseline that every table shows."""

from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.local import local_attention


class Window(Mixer):
    def forward(self, call: AttentionCall) -> Tensor:
        return local_attention(call, self.window, self.sinks).output().to(call.v_BTGV.dtype)
