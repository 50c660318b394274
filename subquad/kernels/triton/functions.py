"""The backend `triton`: one function per op, arguments and results as in subquad.kernels.ops. Importing this needs triton.

Key: as in subquad.kernels.ops.
"""

from subquad.kernels.triton.additive import Additive
from subquad.kernels.triton.delta import Delta
from subquad.kernels.triton.window import Banded, WindowLinear


def _plain(x):
    return None if x is None else x.contiguous()


def _f32(x):
    return None if x is None else x.float().contiguous()


def additive(
    q, k, v, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None, input_precision=None
):
    """`ops.additive`; input_precision: of tl.dot on fp32 operands (None: tf32x3 on NVIDIA, ieee elsewhere)."""
    return Additive.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), _f32(log_decay), _f32(initial_state), scale, output_final_state, cu_seqlens, out_dtype,
        input_precision,
    )  # fmt: skip


def delta(
    q, k, v, beta, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None, input_precision=None
):
    """`ops.delta`."""
    return Delta.apply(
        q.contiguous(), k.contiguous(), v.contiguous(), _f32(beta), _f32(log_decay), _f32(initial_state), scale, output_final_state, cu_seqlens,
        out_dtype, input_precision,
    )  # fmt: skip


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None, input_precision=None,
):  # fmt: skip
    """`ops.banded` for softmax weights."""
    assert weight == "softmax" and log_forget_BXG is None and softcap is None, "why_not said so"
    return Banded.apply(
        *map(_plain, (q, k, v, sink_k_BNGK, sink_v_BNGV, sink_logit_H)), window, sinks, scale, position, cu_seqlens, input_precision
    )


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None, input_precision=None,
):  # fmt: skip
    """`ops.window_linear`."""
    return WindowLinear.apply(
        *map(_plain, (q, k, v, fq, fk, mix)), _f32(log_decay), _f32(initial_state), _plain(sink_k_BNGK), _plain(sink_v_BNGV), window, sinks, scale,
        position, output_final_state, cu_seqlens, input_precision,
    )  # fmt: skip
