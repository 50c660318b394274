"""Tensors as the structs that C++ takes: a pointer, strides in numbers, a dtype.

Key: as in ops.py.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from subquad.kernels.cpu.build import library
from subquad.kernels.features import FUSED

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = [("p", c_void_p), ("sb", c_int64), ("st", c_int64), ("sh", c_int64), ("type", c_int64)]


def _struct(name: str, *fields: tuple[str, type]):
    return type(name, (ctypes.Structure,), {"_fields_": [(f, kind) for names, kind in fields for f in names.split()]})


class Map(ctypes.Structure):
    """A feature map; all zeros: none."""

    _fields_ = [("signs", c_int64), ("norm", c_int64), ("gain", c_double), ("limit", c_double), ("floor", c_double)]

    @classmethod
    def of(cls, name: str | None) -> "Map":
        row = None if name is None else FUSED[name]
        return cls() if row is None else cls(row.signs, row.norm, row.gain, row.limit, row.floor)


LinearArgs = _struct(
    "LinearArgs",
    ("q k v g beta o dq dk dv dg dbeta", _Tensor),
    ("h0 dhT hT dh0 kept seq", c_void_p),
    ("N G R K V mode threads", c_int64),
    ("scale", c_double),
    ("map", Map),
    ("Y", c_int64),
)
WindowArgs = _struct(
    "WindowArgs",
    ("q k v sk sv o den top fq fk mix g dout dden dq dk dv dsk dsv dfq dfk dmix dg", _Tensor),
    ("h0 dhT hT dh0 kept seq", c_void_p),
    ("N G R K V F mode threads window sinks before position own_sinks need_window centred", c_int64),
    ("scale", c_double),
    ("map", Map),
    ("Y", c_int64),
)
StepArgs = _struct(
    "StepArgs", ("q k v beta g sk sv fq mix lk lv", _Tensor), ("S o", c_void_p), ("B G R K V F W N mode", c_int64), ("scale", c_double)
)


def fill(struct: ctypes.Structure, **values) -> None:
    """Tensors of 3 or 4 dimensions become pointer and strides (4: the last must be contiguous), raw ones (states) pointers; None stays null."""
    for name, x in values.items():
        if isinstance(x, Tensor):
            view = _Tensor(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), TYPES[x.dtype])
            setattr(struct, name, view)
        elif x is not None:
            setattr(struct, name, x)


def run(name: str, struct: ctypes.Structure) -> None:
    getattr(library(), name)(ctypes.byref(struct))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows(x: Tensor | None) -> Tensor | None:
    """With contiguous rows: what a tile load takes. Only what differs is copied: the gradient of a sum is one number, seen everywhere."""
    if x is None or x.dim() < 4 or x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()):
        return x
    once = [slice(0, 1) if n > 1 and step == 0 else slice(None) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return x[tuple(once)].contiguous().expand(x.shape)
