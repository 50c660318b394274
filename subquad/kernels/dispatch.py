"""From an op's name and a backend's name to the function that runs.

A backend is a module with one function per op (arguments as in ops.py, without `backend`) and, unless it runs everywhere,
`why_not(op, args, kwargs) -> str | None`: the reason why this call cannot run there, None when it can. It may have `quick(op)`: a function without
checks in Python that returns None for calls it leaves to the one with checks (arguments as in cpu/quick.py), or None.
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.shapes import more_than_numbers
from subquad.registry import check_name

OPS = ("additive", "delta", "banded", "window_linear", "additive_step", "delta_step", "window_linear_step")

# name -> "module:attribute"; the attribute is one that every backend has.
BACKENDS = {
    "triton": "subquad.kernels.triton.functions:additive",
    "cpu": "subquad.kernels.cpu.functions:additive",
    "torch": "subquad.kernels.blocked:additive",
    "definition": "subquad.kernels.definition:additive",
}

log = logging.getLogger("subquad.kernels")
_said: set[tuple[str, str]] = set()
_quick: dict[str, Callable | None] = {}  # of ops for which `auto` has taken a backend that has it
_modules: dict[str, ModuleType | str] = {}  # the module, or why there is none


def backend_module(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    if name not in _modules:
        path = BACKENDS[name].partition(":")[0]
        try:
            _modules[name] = importlib.import_module(path, __package__)
        except ImportError as error:
            _modules[name] = f"{error.name or path} is not installed"
    return _modules[name]


def why_not(name: str, op: str, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why `op` cannot run on backend `name` with these arguments; None when it can."""
    module = backend_module(name)
    if isinstance(module, str):
        return module
    if not hasattr(module, op):
        return f"it has no {op}"
    asks = getattr(module, "why_not", None)
    if asks is None:
        return None
    more = more_than_numbers((*args, *kwargs.values()))
    return asks(op, args, kwargs) if more is None else f"it is compiled code and reads numbers from memory, and the call has {more}"


def quick(op: str, backend: str, *args) -> Any:
    """The op's result where a quick function takes the call: from the second call on, of backend `auto`."""
    run = _quick.get(op) if backend == "auto" else None
    return None if run is None else run(*args)


def call(op: str, backend: str, /, *args, **kwargs):
    """Run `op`. UserError when `backend` is unknown or cannot run this call."""
    if backend == "auto":
        backend = _choose(op, args, kwargs)
    else:
        check_name("backend", backend, ["auto", *BACKENDS])
        reason = why_not(backend, op, args, kwargs)
        if reason is not None:
            raise UserError(f"Backend {backend!r} cannot run {op}: {reason}. Use backend='auto' or backend='torch'.")
    return getattr(_modules.get(backend) or backend_module(backend), op)(*args, **kwargs)


def _choose(op: str, args: tuple, kwargs: dict[str, Any]) -> str:
    on_cpu = next(x for x in args if isinstance(x, Tensor)).device.type == "cpu"
    # On a GPU torch: the Triton kernels are asked for by name until each has been compiled for its targets (docs/kernels_triton.md).
    found = "cpu" if on_cpu and why_not("cpu", op, args, kwargs) is None else "torch"
    if (op, found) not in _said:
        _said.add((op, found))
        log.info("%s: backend %s", op, found)
        if found == "cpu":
            _quick[op] = backend_module(found).quick(op)
    return found
