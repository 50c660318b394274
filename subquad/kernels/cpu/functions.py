"""The ops on the C++ kernels: tensors to pointers, outputs allocated, gradients as autograd functions. Arguments as in ops.py.

Backward recomputes: saved are the inputs, and for the window ops one number (softmax mass) per token and head, plus the output of window_linear.

Key: as in ops.py; N sequences, R = H / G.
"""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.kernels.cpu.build import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = [("p", c_void_p), ("sb", c_int64), ("st", c_int64), ("sh", c_int64), ("type", c_int64)]


def _struct(name: str, *fields: tuple[str, type]):
    return type(name, (ctypes.Structure,), {"_fields_": [(f, kind) for names, kind in fields for f in names.split()]})


_Linear = _struct(
    "_Linear",
    ("q k v g beta o dq dk dv dg dbeta", _Tensor),
    ("h0 dhT hT dh0 seq", c_void_p),
    ("N G R K V mode threads", c_int64),
    ("scale", c_double),
)
_Window = _struct(
    "_Window",
    ("q k v sk sv o den top fq fk mix g dout dden dq dk dv dsk dsv dfq dfk dmix dg", _Tensor),
    ("h0 dhT hT dh0 seq", c_void_p),
    ("N G R K V F mode threads window sinks before position own_sinks need_window", c_int64),
    ("scale", c_double),
)
_Step = _struct("_Step", ("q k v sk sv", _Tensor), ("S fq mix lk lv g o", c_void_p), ("B G R K V F W N mode", c_int64), ("scale", c_double))


def why_not(op: str, args: tuple, kwargs: dict) -> str | None:
    """The reason why a call cannot run here; None when it can."""
    found = library()
    if isinstance(found, str):
        return found
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and (x.device.type != "cpu" or (x.is_floating_point() and x.dtype not in _TYPES)):
            return f"it takes fp32, bf16 and fp16 tensors in main memory, not {x.dtype} on {x.device.type}"
    if op == "banded":
        if kwargs["weight"] != "softmax":
            return f"it has weight='softmax' only, not {kwargs['weight']!r}"
        given = [name for name in ("softcap", "sink_logit_H", "log_forget_BXG") if kwargs[name] is not None]
        if given:
            return f"it has no {', '.join(given)}"
    return None


def _fill(struct: ctypes.Structure, **values) -> None:
    """Tensors of 3 or 4 dimensions become pointer and strides (4: the last must be contiguous), raw ones (states) pointers; None stays null."""
    for name, x in values.items():
        if isinstance(x, Tensor):
            view = _Tensor(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), _TYPES[x.dtype])
            setattr(struct, name, view)
        elif x is not None:
            setattr(struct, name, x)


def _rows(x: Tensor | None) -> Tensor | None:
    """With contiguous rows: what a tile load takes."""
    return x if x is None or x.dim() < 4 or x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Where C++ writes: it writes fp32 and bf16."""
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def _sequences(B: int, T: int, cu_seqlens: Tensor | None) -> Tensor:
    """[N, 3] int64: row, first token, end."""
    if cu_seqlens is None:
        return torch.tensor([[b, 0, T] for b in range(B)], dtype=torch.int64)
    cu = cu_seqlens.to("cpu", torch.int64)
    return torch.stack([torch.zeros_like(cu[1:]), cu[:-1], cu[1:]], 1).contiguous()


def _mode(log_decay: Tensor | None) -> int:
    return 0 if log_decay is None else log_decay.dim() - 2  # [B, T, G] 1, [B, T, G, K] 2


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    G = k.shape[2]
    return dict(G=G, R=q.shape[2] // G, K=q.shape[3], V=v.shape[3], threads=torch.get_num_threads())


def _run(name: str, struct: ctypes.Structure) -> None:
    getattr(library(), name)(ctypes.byref(struct))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _LinearFunction(Function):
    """Op 1, or op 2 where beta is given."""

    @staticmethod
    def forward(ctx, q, k, v, beta, g, h0, seq, scale, final, dtype):
        o = _empty(q, *q.shape[:3], v.shape[3], dtype=dtype)
        hT = torch.empty(seq.shape[0], k.shape[2], k.shape[3], v.shape[3]) if final else None
        ctx.save_for_backward(q, k, v, beta, g, h0)
        ctx.seq, ctx.scale = seq, scale
        _LinearFunction.run("", ctx, q, k, v, beta, g, h0, o=o, hT=_pointer(hT))
        return o.to(dtype), hT

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhT):
        q, k, v, beta, g, h0 = given = ctx.saved_tensors
        dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
        dbeta, dg, dh0 = (None if x is None else torch.empty(x.shape) for x in (beta, g, h0))
        do, dhT = _rows(do), _fp32(dhT)
        _LinearFunction.run("_backward", ctx, *given, o=do, dq=dq, dk=dk, dv=dv, dbeta=dbeta, dg=dg, dh0=_pointer(dh0), dhT=_pointer(dhT))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, dg, dh0, None, None, None, None

    @staticmethod
    def run(direction, ctx, q, k, v, beta, g, h0, **more):
        a = _Linear()
        _fill(a, q=q, k=k, v=v, beta=beta, g=g, h0=_pointer(h0), seq=ctx.seq.data_ptr(), N=ctx.seq.shape[0], mode=_mode(g), scale=ctx.scale,
              **_sizes(q, k, v), **more)  # fmt: skip
        _run(f"subquad_{'additive' if beta is None else 'delta'}{direction}", a)


def additive(q, k, v, log_decay=None, **more):
    return delta(q, k, v, None, log_decay, **more)


def delta(q, k, v, beta, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    seq = _sequences(q.shape[0], q.shape[1], cu_seqlens)
    return _LinearFunction.apply(
        _rows(q), _rows(k), _rows(v), _fp32(beta), _fp32(log_decay), _fp32(initial_state), seq, float(scale), output_final_state,
        out_dtype or v.dtype,
    )  # fmt: skip


class _Setting:
    """What a window op is told besides tensors."""

    def __init__(self, q, k, own_sinks, *, window, sinks, scale, position, cu_seqlens):
        B, T = q.shape[:2]
        self.seq = _sequences(B, T, cu_seqlens)
        self.numbers = dict(window=int(window), sinks=int(sinks) if own_sinks is None else own_sinks.shape[1], before=k.shape[1] - T,
                            position=int(position), own_sinks=int(own_sinks is not None), N=self.seq.shape[0],
                            scale=q.shape[-1] ** -0.5 if scale is None else float(scale))  # fmt: skip

    def run(self, name: str, q, k, v, sk, sv, **more) -> None:
        a = _Window()
        _fill(a, q=q, k=k, v=v, sk=k if sk is None else sk, sv=v if sv is None else sv, seq=self.seq.data_ptr(), **_sizes(q, k, v),
              **self.numbers, **more)  # fmt: skip
        _run(name, a)


class _BandedFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, sk, sv, setting):
        B, T, H, _ = q.shape
        o, den, top = torch.empty(B, T, H, v.shape[3]), torch.empty(B, T, H), torch.empty(B, T, H)
        setting.run("subquad_banded", q, k, v, sk, sv, o=o, den=den, top=top)
        ctx.save_for_backward(q, k, v, sk, sv, top)
        ctx.setting = setting
        ctx.mark_non_differentiable(top)
        return o, den, top

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dden, _):
        q, k, v, sk, sv, top = ctx.saved_tensors
        do, dden = _rows(do), dden.contiguous()
        dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
        dsk, dsv = (None if x is None else _empty(x, *x.shape) for x in (sk, sv))
        ctx.setting.run("subquad_banded_backward", q, k, v, sk, sv, top=top, dout=do, dden=dden, dq=dq, dk=dk, dv=dv, dsk=dsk, dsv=dsv)
        return *(None if d is None else d.to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v), (dsk, sk), (dsv, sv))), None


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None,
):  # fmt: skip
    setting = _Setting(q, k, sink_k_BNGK, window=window, sinks=sinks, scale=scale, position=position, cu_seqlens=cu_seqlens)
    return _BandedFunction.apply(_rows(q), _rows(k), _rows(v), _rows(sink_k_BNGK), _rows(sink_v_BNGV), setting)


class _WindowLinearFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, fq, fk, mix, g, sk, sv, h0, setting, final):
        B, T, H, _ = q.shape
        V, G, F = v.shape[3], k.shape[2], fk.shape[3]
        o = _empty(v, B, T, H, V)
        mass = torch.empty(B, T, H)
        hT = torch.empty(setting.numbers["N"], G, F, V + 1) if final else None
        setting.run("subquad_window_linear", q, k, v, sk, sv, o=o, top=mass, fq=fq, fk=fk, mix=mix, g=g, h0=_pointer(h0), hT=_pointer(hT), F=F,
                    mode=_mode(g))  # fmt: skip
        ctx.save_for_backward(q, k, v, fq, fk, mix, g, sk, sv, h0, o, mass)
        ctx.setting = setting
        return o.to(v.dtype), hT

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhT):
        q, k, v, fq, fk, mix, g, sk, sv, h0, o, mass = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = any(needs[i] for i in (0, 1, 2, 7, 8))
        do, dhT = _rows(do), _fp32(dhT)
        window = {name: _empty(x, *x.shape) for name, x in (("dq", q), ("dk", k), ("dv", v))} if inner else {}
        if inner and sk is not None:
            window |= {"dsk": _empty(sk, *sk.shape), "dsv": _empty(sv, *sv.shape)}
        dfq, dfk, dmix = _empty(fq, *fq.shape), _empty(fk, *fk.shape).zero_(), torch.empty(mix.shape)
        dg = None if g is None else torch.empty(g.shape)
        dh0 = None if h0 is None else torch.empty_like(h0)
        ctx.setting.run("subquad_window_linear_backward", q, k, v, sk, sv, o=o, top=mass, fq=fq, fk=fk, mix=mix, g=g, h0=_pointer(h0),
                        dhT=_pointer(dhT), dh0=_pointer(dh0), dout=do, dfq=dfq, dfk=dfk, dmix=dmix, dg=dg, F=fk.shape[3], mode=_mode(g),
                        need_window=int(inner), **window)  # fmt: skip
        give = lambda name, x: window[name].to(x.dtype) if name in window else None  # noqa: E731
        return (give("dq", q), give("dk", k), give("dv", v), dfq.to(fq.dtype), dfk.to(fk.dtype), dmix, dg, give("dsk", sk), give("dsv", sv), dh0,
                None, None)  # fmt: skip


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None,
):  # fmt: skip
    setting = _Setting(q, k, sink_k_BNGK, window=window, sinks=sinks, scale=scale, position=position, cu_seqlens=cu_seqlens)
    return _WindowLinearFunction.apply(
        _rows(q), _rows(k), _rows(v), _rows(fq), _rows(fk), _fp32(mix), _fp32(log_decay), _rows(sink_k_BNGK), _rows(sink_v_BNGV),
        _fp32(initial_state), setting, output_final_state,
    )  # fmt: skip


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


def additive_step(q, k, v, state, log_decay=None, *, scale=1.0):
    return delta_step(q, k, v, None, state, log_decay, scale=scale)


@_in_place
def delta_step(q, k, v, beta, state, log_decay=None, *, scale=1.0):
    B, H, K = q.shape
    G, V = k.shape[1], v.shape[2]
    q, k, v, beta, g = (_fp32(x) for x in (q, k, v, beta, log_decay))
    o = torch.empty(B, H, V)
    mode = 0 if g is None else g.dim() - 1
    library().subquad_linear_step(
        *(c_void_p(_pointer(x)) for x in (q, k, v, beta, g, state, o)), *(c_int64(n) for n in (B * G, H // G, K, V, mode)), c_double(scale)
    )
    return o


@_in_place
def window_linear_step(
    q, k, v, fq=None, mix=None, state=None, left_fk=None, left_v=None, log_decay=None, *, scale=None, sink_k_BNGK=None, sink_v_BNGV=None
):
    B, H, K = q.shape
    G, V = k.shape[2], v.shape[3]
    q, k, v, sk, sv = _rows(q.unsqueeze(1)), _rows(k), _rows(v), _rows(sink_k_BNGK), _rows(sink_v_BNGV)
    fq, mix, lk, lv, g = (_fp32(x) for x in (fq, mix, left_fk, left_v, log_decay))
    o = torch.empty(B, H, V)
    a = _Step()
    _fill(a, q=q, k=k, v=v, sk=sk, sv=sv, S=_pointer(state), fq=_pointer(fq), mix=_pointer(mix), lk=_pointer(lk), lv=_pointer(lv), g=_pointer(g),
          o=o.data_ptr(), B=B, G=G, R=H // G, K=K, V=V, F=0 if state is None else state.shape[2], W=k.shape[1], N=0 if sk is None else sk.shape[1],
          mode=0 if g is None else g.dim() - 1, scale=K**-0.5 if scale is None else float(scale))  # fmt: skip
    _run("subquad_window_linear_step", a)
    return o
