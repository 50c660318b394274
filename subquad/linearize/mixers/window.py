"""`window`: sinks and a sliding window, nothing trained (SEEDS C04, C05). The strong baseline that every table shows."""

from torch import Tensor

from subquad.kernels.ops import window_linear_step
from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.local import extend, one_token, plain_position, remember_slots, window_attention


class Window(Mixer):
    def forward(self, call: AttentionCall) -> Tensor:
        if (
            call.state is not None
            and call.state.fewest >= self.window + self.sinks
            and one_token(call.k_BTGK)
            and plain_position(call) is not None
        ):
            slots = extend(call, self.sinks)
            out = window_linear_step(
                call.q_BTGRK[:, 0].flatten(1, 2),
                slots.k[:, -self.window :],
                slots.v[:, -self.window :],
                scale=call.scale,
                sink_k_BNGK=slots.sink_k,
                sink_v_BNGV=slots.sink_v,
            )
            remember_slots(call, slots, self.window)
            return out.view(*call.q_BTGRK.shape[:4], -1).to(call.v_BTGV.dtype)
        return window_attention(call, self.window, self.sinks).to(call.v_BTGV.dtype)
