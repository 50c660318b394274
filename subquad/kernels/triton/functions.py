"""The backend `triton`: one function per op, arguments and results as in subquad.kernels.ops. Importing this needs triton.

Key: as in subquad.kernels.ops.
"""

import inspect
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.additive import Additive
from subquad.kernels.triton.delta import Delta
from subquad.kernels.triton.steps import step, window_step
from subquad.kernels.triton.window import Banded, WindowLinear
from subquad.kernels.weights import divisor


def _plain(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def _f32(*tensors):
    return [None if x is None else x.float().contiguous() for x in tensors]


def _recurrent(*, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None, input_precision=None):
    """The keywords of `additive` and `delta` in their functions' order; input_precision: of tl.dot on fp32 operands (see `precision_of`)."""
    return *_f32(initial_state), scale, output_final_state, cu_seqlens, out_dtype, input_precision


def additive(q, k, v, log_decay=None, *, feature_map=None, **options):
    """`ops.additive`."""
    return Additive.apply(*_plain(q, k, v), *_f32(log_decay), *_recurrent(**options), feature_map)


def delta(q, k, v, beta, log_decay=None, **options):
    """`ops.delta`."""
    return Delta.apply(*_plain(q, k, v), *_f32(beta, log_decay), *_recurrent(**options))


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None, normalise=False, input_precision=None,
):  # fmt: skip
    """`ops.banded` for softmax weights."""
    assert weight == "softmax" and log_forget_BXG is None and softcap is None, "why_not said so"
    sinks = sinks if sink_k_BNGK is None else sink_k_BNGK.shape[1]
    tensors = _plain(q, k, v, sink_k_BNGK, sink_v_BNGV, sink_logit_H)
    numerator, denominator, top = Banded.apply(*tensors, window, sinks, scale, position, cu_seqlens, input_precision)
    return (numerator / divisor(denominator), denominator.detach(), top) if normalise else (numerator, denominator, top)


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None, feature_map=None, input_precision=None,
):  # fmt: skip
    """`ops.window_linear`."""
    sinks = sinks if sink_k_BNGK is None else sink_k_BNGK.shape[1]
    tensors = *_plain(q, k, v, fq, fk, mix), *_f32(log_decay, initial_state), *_plain(sink_k_BNGK, sink_v_BNGV)
    return WindowLinear.apply(*tensors, window, sinks, scale, position, output_final_state, cu_seqlens, input_precision, feature_map)


def additive_step(q, k, v, state, log_decay=None, *, scale=1.0):
    """`ops.additive_step`."""
    return step(*_plain(q, k, v), None, *_f32(log_decay), state, scale)


def delta_step(q, k, v, beta, state, log_decay=None, *, scale=1.0):
    """`ops.delta_step`."""
    return step(*_plain(q, k, v), *_f32(beta, log_decay), state, scale)


def window_linear_step(
    q, k, v, fq=None, mix=None, state=None, left_fk=None, left_v=None, log_decay=None, *, scale=None, sink_k_BNGK=None, sink_v_BNGV=None
):
    """`ops.window_linear_step`."""
    q, k, v, fq, mix, left_fk, left_v, sink_k, sink_v = _plain(q, k, v, fq, mix, left_fk, left_v, sink_k_BNGK, sink_v_BNGV)
    return window_step(q, k, v, fq, mix, state, left_fk, left_v, *_f32(log_decay), scale, sink_k, sink_v)


RANGES = "disable_licm" in inspect.signature(tl.range.__init__).parameters
LARGEST_HEAD = 256  # sizes of keys, values and features the tiles are laid out for


def why_not(op, args, kwargs):
    """Why this call cannot run here; None when it can."""
    q = args[0]
    if not RANGES:
        return f"triton {triton.__version__} is too old: its tl.range has no disable_licm"
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors are on the CPU and Triton needs a GPU (TRITON_INTERPRET=1 runs it, slowly, in Triton's interpreter)"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes with float16, bfloat16 or float32 inputs, not {str(q.dtype).removeprefix('torch.')}"
    sizes = [x.shape[-1] for x in args[: 5 if op.startswith("window") else 3] if isinstance(x, Tensor) and x.dim() == q.dim()]
    largest = max(sizes) if kwargs.get("feature_map") is None else max(*sizes, 2 * sizes[0 if op == "additive" else 3])
    if largest > LARGEST_HEAD:
        return f"heads of size {largest}; it takes up to {LARGEST_HEAD}"
    if op == "banded":
        if kwargs.get("weight", "softmax") != "softmax":
            return f"weight {kwargs['weight']!r}; it has softmax only"
        if kwargs.get("softcap") is not None:
            return "softcap"
    return None
