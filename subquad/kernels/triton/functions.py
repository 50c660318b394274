"""The backend `triton`: one function per op, arguments and results as in subquad.kernels.ops. Importing this needs triton.

Key: as in subquad.kernels.ops.
"""

from subquad.kernels.triton.additive import Additive
from subquad.kernels.triton.delta import Delta


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
