"""One token at a time on the C++ kernels. Arguments as in ops.py.

Key: as in ops.py.
"""

import functools

import torch
from torch import Tensor

from subquad.kernels.cpu.structs import StepArgs, fill, pointer, rows, run


def _in_place(fn):
    """The C++ steps write to contiguous fp32: any other state is copied there and back."""

    @functools.wraps(fn)
    def step(*args, **kwargs):
        at = _STATE_AT[fn.__name__]
        state = args[at] if len(args) > at else None
        if state is None or (state.dtype == torch.float32 and state.is_contiguous()):
            return fn(*args, **kwargs)
        own = state.float().contiguous()
        out = fn(*args[:at], own, *args[at + 1 :], **kwargs)
        state.copy_(own)
        return out

    return step


_STATE_AT = {"delta_step": 4, "window_linear_step": 5}


def _run(name: str, q: Tensor, B: int, G: int, V: int, scale: float, g: Tensor | None, one: dict, **more) -> Tensor:
    """one: tensors without a token dimension."""
    o = torch.empty(B, q.shape[1], V, dtype=torch.float32)
    one = {field: None if x is None else rows(x.unsqueeze(1)) for field, x in (one | {"q": q, "g": g}).items()}
    a = StepArgs()
    fill(a, **one, o=o.data_ptr(), B=B, G=G, R=q.shape[1] // G, K=q.shape[2], V=V, mode=0 if g is None else g.dim() - 1, scale=float(scale), **more)
    run(name, a)
    return o


def additive_step(q, k, v, state, log_decay=None, *, scale=1.0):
    return delta_step(q, k, v, None, state, log_decay, scale=scale)


@_in_place
def delta_step(q, k, v, beta, state, log_decay=None, *, scale=1.0):
    given = dict(k=k, v=v, beta=beta)
    return _run("subquad_linear_step", q, k.shape[0], k.shape[1], v.shape[2], scale, log_decay, given, S=state.data_ptr())


@_in_place
def window_linear_step(
    q, k, v, fq=None, mix=None, state=None, left_fk=None, left_v=None, log_decay=None, *, scale=None, sink_k_BNGK=None, sink_v_BNGV=None
):
    given = dict(fq=fq, mix=mix, lk=left_fk, lv=left_v)
    return _run(
        "subquad_window_linear_step", q, k.shape[0], k.shape[2], v.shape[3], q.shape[2] ** -0.5 if scale is None else scale, log_decay, given,
        k=rows(k), v=rows(v), sk=rows(sink_k_BNGK), sv=rows(sink_v_BNGV), S=pointer(state), F=0 if state is None else state.shape[2],
        W=k.shape[1], N=0 if sink_k_BNGK is None else sink_k_BNGK.shape[1],
    )  # fmt: skip
