"""Compile the C++ once per machine and load it.

The library is kept in a folder of the user's cache, named by a hash of source, flags, compiler and instruction set: another version or machine never
meets it. It is written under a temporary name and renamed, so that processes may race. No compiler, or one that fails: `library()` gives the reason and
callers use torch; one notice is logged.

Environment: SUBQUAD_CPU_ISA avx512 | avx2 | portable (default: what torch finds), SUBQUAD_CACHE (folder), CXX (compiler).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from subquad.errors import UserError
from subquad.kernels.cpu.banded_source import SOURCE as BANDED
from subquad.kernels.cpu.delta_source import SOURCE as DELTA
from subquad.kernels.cpu.features_source import SOURCE as FEATURES
from subquad.kernels.cpu.linear_backward_source import SOURCE as LINEAR_BACKWARD
from subquad.kernels.cpu.linear_source import SOURCE as LINEAR
from subquad.kernels.cpu.products_source import SOURCE as PRODUCTS
from subquad.kernels.cpu.python_source import SOURCE as PYTHON
from subquad.kernels.cpu.steps_source import SOURCE as STEPS
from subquad.kernels.cpu.threads_source import SOURCE as THREADS
from subquad.kernels.cpu.tiles_source import SOURCE as TILES
from subquad.kernels.cpu.vectors_source import SOURCE as VECTORS
from subquad.kernels.cpu.window_linear_source import SOURCE as WINDOW_LINEAR

log = logging.getLogger("subquad.kernels")

SOURCE = VECTORS + TILES + PRODUCTS + THREADS + FEATURES + LINEAR + LINEAR_BACKWARD + DELTA + BANDED + WINDOW_LINEAR + STEPS + PYTHON
# Contraction of a * b + c is the only freedom the compiler gets: the same instructions every run, NaN and infinities as they should be.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-w")
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
_OF_TORCH = {"AVX512": "avx512", "AVX2": "avx2"}
SECONDS = 900  # a compile takes about seven, on a machine with nothing else to do


def isa() -> str:
    """The instruction set in use."""
    named = os.environ.get("SUBQUAD_CPU_ISA")
    if named:
        if named not in ISA_FLAGS:
            raise UserError(f"SUBQUAD_CPU_ISA={named!r}: allowed are {', '.join(ISA_FLAGS)}.")
        return named
    return _OF_TORCH.get(torch.backends.cpu.get_cpu_capability(), "portable")


def cache_folder() -> Path:
    named = os.environ.get("SUBQUAD_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subquad"


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++")


@cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none. Compiles on the first call of the first process."""
    try:
        return ctypes.CDLL(str(_built()))
    except _Missing as error:
        reason = str(error)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("The C++ kernels are not available (%s); torch does their work, slower.", reason)
    return reason


class _Missing(Exception):
    pass


def _built() -> Path:
    found = compiler()
    name = isa()
    flags = (*FLAGS, *ISA_FLAGS[name])
    mark = hashlib.sha256("\n".join([SOURCE, *flags, platform.machine(), platform.system()]).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{name}-{mark}.so"
    if path.exists():
        return path
    if found is None:
        raise _Missing(f"no C++ compiler: {os.environ.get('CXX') or 'g++'} is not on the PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, out = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        source.write_text(SOURCE, encoding="utf-8")
        run = subprocess.run([found, *flags, str(source), "-o", str(out)], capture_output=True, text=True, timeout=SECONDS)
        if run.returncode:
            raise _Missing(f"{found} failed: {(run.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(out, path)
    return path
