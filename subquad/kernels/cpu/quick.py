"""Calls that skip the checks in Python: what ops.py tries first. Half a millisecond a call once other work has emptied the caches, 0.1 before.

Key: as in ops.py.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from subquad.kernels.cpu.build import library
from subquad.kernels.features import FUSED
from subquad.kernels.shapes import more_than_numbers

# Functions of python_source.py, by number; their arguments stand there. None for what is not given.
_STEPS = {"additive_step": 0, "delta_step": 0, "window_linear_step": 1}
_OPS = {"additive": 2, "delta": 2, "window_linear": 3}
_MAPS = {None: (0, 0, 0, 0, 0)} | {name: (row.signs, row.norm, row.gain, row.limit, row.floor) for name, row in FUSED.items()}


def quick(op: str) -> Callable | None:
    """The compiled function of a step or an op, which returns None for a call that it leaves to the checked way; None where torch has no exchange table."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    found = library()
    number = (_STEPS | _OPS).get(op)
    if number is None or capsule is None or isinstance(found, str):
        return None
    open_capsule = ctypes.pythonapi.PyCapsule_GetPointer
    open_capsule.restype, open_capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    make = ctypes.PyDLL(found._name).subquad_python_function
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_int64, *[ctypes.py_object] * 3, ctypes.c_void_p]
    run = make(number, None, Tensor, Parameter, open_capsule(capsule, b"dlpack_exchange_api"))
    return run if op in _STEPS or run is None else _without_gradients(run)


def _without_gradients(run: Callable) -> Callable:
    def op(tensors: tuple, settings: tuple, feature_map: str | None = None) -> tuple[Tensor, Tensor | None] | None:
        numbers = _MAPS.get(feature_map)
        if numbers is None or wanted(*tensors) or more_than_numbers(tensors) is not None:
            return None
        return run(*tensors, *settings, torch.get_num_threads(), *numbers)

    return op


def wanted(*given: Tensor | None) -> bool:
    """Is a gradient asked for? To be asked before Function.apply, inside which none are recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
