"""Compile Triton kernels for GPUs that are not here, and read off what the compilers decided.

A stand-in driver names the target; the ops are called with CPU tensors, and every launch compiles instead of running, so that specialisation (16-byte
alignment, arguments equal to 1, missing arguments) is exactly a launch's. The wheel brings ptxas, cuobjdump and the AMD linker. Nothing is executed:
figures are registers, spills, shared memory and instructions, never a time on a GPU. Not in one process with the interpreter.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import triton
from stand_in import TARGETS, StandIn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")  # PTX; on AMD every v_mfma


@dataclass
class Compiled:
    kernel: str
    target: str
    options: dict
    seconds: float
    figures: dict = field(default_factory=dict)

    def row(self) -> dict:
        return {"kernel": self.kernel, "target": self.target, **self.options, **self.figures}


@contextlib.contextmanager
def compiling(name: str, seen: dict | None = None, gpu: StandIn | None = None, read: bool = True):
    """Inside, every launch is compiled for target `name`; yields the list of Compiled, one a launch.

    seen: shared between calls, so that one kernel is compiled and read once. gpu: the driver to answer for it, a StandIn unless given.
    read: whether the binary's figures are read off (that takes longer than compiling some kernels).
    """
    found: list[Compiled] = []
    seen = {} if seen is None else seen
    run, getitem = JITFunction.run, triton.KernelInterface.__getitem__

    def compile_only(function, *args, grid, warmup, **kwargs):
        function.device_caches.clear()
        began = cpu_seconds()
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if isinstance(kernel, Future) else kernel
        seconds = cpu_seconds() - began
        if (name, kernel.hash) not in seen:
            options = {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages}
            options |= {
                key: kwargs[key] for key in ("K", "V", "F", "BT", "BV", "DECAY", "MODE", "EXTRA", "REVERSE", "LINEAR") if key in kwargs
            }
            seen[name, kernel.hash] = Compiled(function.__name__, name, options, seconds, figures(kernel, TARGETS[name]) if read else {})
        found.append(seen[name, kernel.hash])
        return kernel

    driver.set_active(gpu or StandIn(name))
    JITFunction.run = compile_only
    triton.KernelInterface.__getitem__ = lambda kernel, grid: lambda *a, **k: kernel.run(*a, grid=grid, warmup=True, **k)
    try:
        yield found
    finally:
        JITFunction.run, triton.KernelInterface.__getitem__ = run, getitem


def cpu_seconds() -> float:
    """Processor seconds of this process and its children (ptxas): the same however busy the machine is."""
    return sum(os.times()[:4])


def figures(kernel, target: GPUTarget) -> dict:
    return nvidia(kernel, target.arch) if target.backend == "cuda" else amd(kernel)


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def nvidia(kernel, arch: int) -> dict:
    """Registers and stack from the binary; instructions from PTX, whose matrix instructions become one or more of the machine's each."""
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    names = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)[^\n]*;$", kernel.asm["ptx"], re.M)
    kinds = Counter(kind for name in names for kind in MATRIX if name.startswith(kind))
    return {
        "registers": registers,
        "spill": spilled(kernel, arch) if stack else 0,  # what is spilled lies on the stack
        "stack": stack,
        "shared": kernel.metadata.shared,
        "instructions": len(names),
        "matrix": kinds.total(),
        "matrix_kind": "+".join(sorted(kinds)),
    }


def spilled(kernel, arch: int) -> int:
    """Bytes of all instructions that store to and load from the stack, at least 1: ptxas, asked once more, says how many."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        gpu = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        said = _tool(get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", gpu, ptx.name, "-o", os.devnull)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return max(1, int(stores) + int(loads))


def amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    names = Counter(re.findall(r"^\s+((?:v|s|ds|global|buffer|scratch)_\w+)", text, re.M))
    return {
        "registers": note("vgpr_count"),
        "spill": 4 * note("vgpr_spill_count"),
        "scalar_spill": note("sgpr_spill_count"),  # to lanes of vector registers, not to memory
        "stack": note("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "instructions": sum(names.values()),
        "matrix": sum(count for name, count in names.items() if "mfma" in name),
        "matrix_kind": "mfma" if any("mfma" in name for name in names) else "",
    }
