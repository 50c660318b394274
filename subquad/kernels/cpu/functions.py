"""The ops on the C++ kernels: tensors to pointers, outputs allocated, gradients as autograd functions. Arguments as in ops.py.

Saved for backward are the inputs, the state of the linear ops before each 64 tokens (K V / 64 numbers a token and head), and for the window ops one
number (softmax mass) per token and head, plus the output of window_linear. The rest is recomputed.

Key: as in ops.py; N sequences, R = H / G.
"""

import ctypes
import itertools

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from subquad.kernels.cpu.build import library
from subquad.kernels.cpu.quick import quick, wanted  # noqa: F401  (a backend is one module)
from subquad.kernels.cpu.steps import additive_step, delta_step, window_linear_step  # noqa: F401
from subquad.kernels.cpu.structs import TYPES, LinearArgs, Map, WindowArgs, fill, pointer, rows, run
from subquad.kernels.features import signs
from subquad.kernels.weights import divisor


def why_not(op: str, args: tuple, kwargs: dict) -> str | None:
    """The reason why a call cannot run here; None when it can."""
    found = library()
    if isinstance(found, str):
        return found
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and (x.device.type != "cpu" or (x.is_floating_point() and x.dtype not in TYPES)):
            return f"it takes fp32, bf16 and fp16 tensors in main memory, not {x.dtype} on {x.device.type}"
    if op == "banded":
        if kwargs["weight"] != "softmax":
            return f"it has weight='softmax' only, not {kwargs['weight']!r}"
        given = [name for name in ("softcap", "sink_logit_H", "log_forget_BXG") if kwargs[name] is not None]
        if given:
            return f"it has no {', '.join(given)}"
    return None


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Where C++ writes: it writes fp32 and bf16."""
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def _sequences(B: int, T: int, cu_seqlens: Tensor | None) -> ctypes.Array:
    """[N][3] int64: row, first token, end. (Two tensor operations less: 75 us where other work had emptied the caches.)"""
    found = [(b, 0, T) for b in range(B)] if cu_seqlens is None else [(0, *pair) for pair in itertools.pairwise(cu_seqlens.tolist())]
    return (ctypes.c_int64 * 3 * len(found))(*found)


def _mode(log_decay: Tensor | None) -> int:
    return 0 if log_decay is None else log_decay.dim() - 2  # [B, T, G] 1, [B, T, G, K] 2


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    G = k.shape[2]
    return dict(G=G, R=q.shape[2] // G, K=q.shape[3], V=v.shape[3], threads=torch.get_num_threads())


def _kept(seq: ctypes.Array, wanted: bool, G: int, K: int, V: int) -> Tensor | None:
    """Room for the states that backward starts from, one for 64 tokens of each sequence; None where no gradient is asked for."""
    return torch.empty(sum((end - first + 63) // 64 for _, first, end in seq), G, K, V, dtype=torch.float32) if wanted else None


class _LinearFunction(Function):
    """Op 1, or op 2 where beta is given."""

    @staticmethod
    def forward(ctx, q, k, v, beta, g, h0, seq, scale, final, dtype, feature_map, wanted):
        G, K, V = k.shape[2], k.shape[3] * signs(feature_map), v.shape[3]
        o = _empty(q, *q.shape[:3], V, dtype=dtype)
        hT = torch.empty(len(seq), G, K, V) if final else None
        kept = _kept(seq, wanted, G, K, V)
        ctx.save_for_backward(q, k, v, beta, g, h0, kept)
        ctx.seq, ctx.scale, ctx.feature_map = seq, scale, feature_map
        _LinearFunction.run("", ctx, q, k, v, beta, g, h0, kept, o=o, hT=pointer(hT))
        return o.to(dtype), hT

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhT):
        q, k, v, beta, g, h0, _ = given = ctx.saved_tensors
        dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
        dbeta, dg, dh0 = (None if x is None else torch.empty(x.shape) for x in (beta, g, h0))
        do, dhT = rows(do), _fp32(dhT)
        _LinearFunction.run("_backward", ctx, *given, o=do, dq=dq, dk=dk, dv=dv, dbeta=dbeta, dg=dg, dh0=pointer(dh0), dhT=pointer(dhT))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, dg, dh0, *(None,) * 6

    @staticmethod
    def run(direction, ctx, q, k, v, beta, g, h0, kept, **more):
        a = LinearArgs()
        fill(a, q=q, k=k, v=v, beta=beta, g=g, h0=pointer(h0), kept=pointer(kept), seq=ctypes.addressof(ctx.seq), N=len(ctx.seq), mode=_mode(g),
             scale=ctx.scale, map=Map.of(ctx.feature_map), Y=k.shape[3],
             **_sizes(q, k, v) | dict(K=k.shape[3] * signs(ctx.feature_map)), **more)  # fmt: skip
        run(f"subquad_{'additive' if beta is None else 'delta'}{direction}", a)


def additive(q, k, v, log_decay=None, **more):
    return delta(q, k, v, None, log_decay, **more)


def delta(
    q, k, v, beta, log_decay=None, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None, feature_map=None
):
    seq = _sequences(q.shape[0], q.shape[1], cu_seqlens)
    given = rows(q), rows(k), rows(v), _fp32(beta), _fp32(log_decay), _fp32(initial_state)
    return _LinearFunction.apply(*given, seq, float(scale), output_final_state, out_dtype or v.dtype, feature_map, wanted(*given))


def _own_sinks(k, v, sk, sv, sinks: int, position: int) -> tuple[Tensor | None, Tensor | None]:
    """Sinks that stand at the head of k, before the first query, are handed over by themselves: C++ looks for its own among the queries' tokens."""
    return (sk, sv) if sk is not None or not sinks or not position else (k[:, :sinks], v[:, :sinks])


class _Setting:
    """What a window op is told besides tensors."""

    def __init__(self, q, k, own_sinks, *, window, sinks, scale, position, cu_seqlens):
        B, T = q.shape[:2]
        self.seq = _sequences(B, T, cu_seqlens)
        self.numbers = dict(window=int(window), sinks=int(sinks) if own_sinks is None else own_sinks.shape[1], before=k.shape[1] - T,
                            position=int(position), own_sinks=int(own_sinks is not None), N=len(self.seq),
                            scale=q.shape[-1] ** -0.5 if scale is None else float(scale))  # fmt: skip

    def run(self, name: str, q, k, v, sk, sv, **more) -> None:
        a = WindowArgs()
        fill(a, q=q, k=k, v=v, sk=k if sk is None else sk, sv=v if sv is None else sv, seq=ctypes.addressof(self.seq), **_sizes(q, k, v),
             **self.numbers, **more)  # fmt: skip
        run(name, a)


class _BandedFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, sk, sv, setting, normalise):
        B, T, H, _ = q.shape
        o, den, top = torch.empty(B, T, H, v.shape[3]), torch.empty(B, T, H), torch.empty(B, T, H)
        setting.run("subquad_banded", q, k, v, sk, sv, o=o, den=den, top=top)
        ctx.save_for_backward(q, k, v, sk, sv, top, den if normalise else None)
        ctx.setting = setting
        ctx.mark_non_differentiable(*(den, top) if normalise else (top,))
        return o.div_(divisor(den)) if normalise else o, den, top

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dden, _):
        q, k, v, sk, sv, top, den = ctx.saved_tensors
        do, dden = (rows(do), dden.contiguous()) if den is None else (rows(do / divisor(den)), den)
        dq, dk, dv = (_empty(x, *x.shape) for x in (q, k, v))
        dsk, dsv = (None if x is None else _empty(x, *x.shape) for x in (sk, sv))
        ctx.setting.run("subquad_banded_backward", q, k, v, sk, sv, top=top, dout=do, dden=dden, dq=dq, dk=dk, dv=dv, dsk=dsk, dsv=dsv,
                        centred=int(den is not None))  # fmt: skip
        return *(None if d is None else d.to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v), (dsk, sk), (dsv, sv))), None, None


def banded(
    q, k, v, *, window, sinks=0, scale=None, weight="softmax", log_forget_BXG=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, softcap=None,
    sink_logit_H=None, cu_seqlens=None, normalise=False,
):  # fmt: skip
    sk, sv = _own_sinks(k, v, sink_k_BNGK, sink_v_BNGV, sinks, position)
    setting = _Setting(q, k, sk, window=window, sinks=sinks, scale=scale, position=position, cu_seqlens=cu_seqlens)
    return _BandedFunction.apply(rows(q), rows(k), rows(v), rows(sk), rows(sv), setting, normalise)


class _WindowLinearFunction(Function):
    @staticmethod
    def forward(ctx, q, k, v, fq, fk, mix, g, sk, sv, h0, setting, final, feature_map, wanted):
        B, T, H, _ = q.shape
        V, G, F = v.shape[3], k.shape[2], fk.shape[3] * signs(feature_map)
        o = _empty(v, B, T, H, V)
        mass = torch.empty(B, T, H)
        hT = torch.empty(setting.numbers["N"], G, F, V + 1) if final else None
        kept = _kept(setting.seq, wanted, G, F, V + 1)
        setting.run("subquad_window_linear", q, k, v, sk, sv, o=o, top=mass, fq=fq, fk=fk, mix=mix, g=g, h0=pointer(h0), hT=pointer(hT),
                    kept=pointer(kept), F=F, Y=fk.shape[3], map=Map.of(feature_map), mode=_mode(g))  # fmt: skip
        ctx.save_for_backward(q, k, v, fq, fk, mix, g, sk, sv, h0, o, mass, kept)
        ctx.setting, ctx.feature_map = setting, feature_map
        return o.to(v.dtype), hT

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dhT):
        q, k, v, fq, fk, mix, g, sk, sv, h0, o, mass, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = any(needs[i] for i in (0, 1, 2, 7, 8))
        do, dhT = rows(do), _fp32(dhT)
        window = {name: _empty(x, *x.shape) for name, x in (("dq", q), ("dk", k), ("dv", v))} if inner else {}
        if inner and sk is not None:
            window |= {"dsk": _empty(sk, *sk.shape), "dsv": _empty(sv, *sv.shape)}
        dfq, dfk, dmix = _empty(fq, *fq.shape), _empty(fk, *fk.shape), torch.empty(mix.shape)
        dg = None if g is None else torch.empty(g.shape)
        dh0 = None if h0 is None else torch.empty_like(h0)
        ctx.setting.run("subquad_window_linear_backward", q, k, v, sk, sv, o=o, top=mass, fq=fq, fk=fk, mix=mix, g=g, kept=pointer(kept),
                        dhT=pointer(dhT), dh0=pointer(dh0), dout=do, dfq=dfq, dfk=dfk, dmix=dmix, dg=dg, F=fk.shape[3] * signs(ctx.feature_map),
                        Y=fk.shape[3], map=Map.of(ctx.feature_map), mode=_mode(g), need_window=int(inner), **window)  # fmt: skip
        give = lambda name, x: window[name].to(x.dtype) if name in window else None  # noqa: E731
        return (give("dq", q), give("dk", k), give("dv", v), dfq.to(fq.dtype), dfk.to(fk.dtype), dmix, dg, give("dsk", sk), give("dsv", sv), dh0,
                None, None, None, None)  # fmt: skip


def window_linear(
    q, k, v, fq, fk, mix, log_decay=None, *, window, sinks=0, scale=None, position=0, sink_k_BNGK=None, sink_v_BNGV=None, initial_state=None,
    output_final_state=False, cu_seqlens=None, feature_map=None,
):  # fmt: skip
    sk, sv = _own_sinks(k, v, sink_k_BNGK, sink_v_BNGV, sinks, position)
    setting = _Setting(q, k, sk, window=window, sinks=sinks, scale=scale, position=position, cu_seqlens=cu_seqlens)
    given = (rows(q), rows(k), rows(v), rows(fq), rows(fk), _fp32(mix), _fp32(log_decay), rows(sk), rows(sv), _fp32(initial_state))
    return _WindowLinearFunction.apply(*given, setting, output_final_state, feature_map, wanted(*given))
