"""`subquad doctor`: what is installed, what it means, and with --kernels every kernel against its definition on this machine's devices.

The kernels' tests cannot run on every GPU there is; owners of one can run this and see.

Key: B batch, T tokens, H query heads, G key/value heads, K key size, V value size, F features.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import subquad
from subquad.kernels import dispatch, ops

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "fla-core", "peft", "datasets", "lm-eval")
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # fp32: a GPU may compute products in tf32; bf16: some roundings of 2^-9

BANDED = {"weight": "softmax", "softcap": None, "sink_logit_H": None, "log_forget_BXG": None}  # what the check of op banded asks for


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, devices and compilers as plain values."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "subquad": subquad.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
    }


def findings(found: dict[str, Any]) -> list[str]:
    """What the environment means for the user, as sentences; empty when there is nothing to say."""
    said, packages = [], found["packages"]
    if packages["triton"] is None and found["gpus"]:
        said.append("There is a GPU but no triton: ops fall back to plain torch. Install triton.")
    if packages["triton"] is not None and not found["gpus"]:
        said.append("Triton kernels need a GPU; there is none, so the CPU and torch backends are used.")
    if found["compiler"] is None:
        said.append("No C++ compiler (g++, or CXX): on the CPU ops fall back to plain torch, which is several times slower.")
    if packages["fla-core"] is not None and not found["gpus"]:
        said.append(
            "fla-core is installed but there is no GPU: transformers' own Qwen3-Next, Qwen3.5 and similar models call fla's kernels as soon as it can be "
            "imported and crash on the CPU ('0 active drivers'), with or without subquad. Uninstall fla-core to run those models here."
        )
    return said


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable, dict]]:
    """(op, what, function, arguments) of every check; tensors in `arguments` that require grad are compared by gradient too."""
    generator = torch.Generator().manual_seed(0)
    B, T, G, R, K, V = 2, 150, 2, 2, 64, 64
    H = G * R

    def tensor(*shape, low=None, kind=dtype, grad=True):
        x = torch.randn(*shape, generator=generator) if low is None else low + torch.rand(*shape, generator=generator)
        return x.to(device, kind).requires_grad_(grad)

    full = torch.float32
    qkv = {"q_BTHK": tensor(B, T, H, K), "k_BTGK": tensor(B, T, G, K), "v_BTGV": tensor(B, T, G, V)}
    slots = {"q_BTHK": qkv["q_BTHK"], "k_BXGK": qkv["k_BTGK"], "v_BXGV": qkv["v_BTGV"]}
    gates = {"none": None, "scalar": tensor(B, T, G, low=-1, kind=full), "vector": tensor(B, T, G, K, low=-1, kind=full)}
    state = tensor(B, G, K, V, kind=full)
    for kind, gate in gates.items():
        yield "additive", f"decay {kind}", ops.additive, qkv | dict(log_decay=gate, scale=0.1, initial_state=state, output_final_state=True)
    wide = tensor(B, G, 2 * K, V, kind=full)
    inside = dict(feature_map="hedgehog_softmax", initial_state=wide, output_final_state=True)
    yield "additive", "Hedgehog features inside", ops.additive, qkv | dict(log_decay=gates["scalar"]) | inside
    unit = torch.nn.functional.normalize(qkv["k_BTGK"].detach().float(), dim=-1).to(dtype).requires_grad_()
    keys = qkv | dict(k_BTGK=unit, beta_BTG=tensor(B, T, G, low=0, kind=full), scale=0.1, initial_state=state, output_final_state=True)
    for kind in ("none", "scalar"):
        yield "delta", f"decay {kind}", ops.delta, keys | dict(log_decay_BTG=gates[kind])
    yield "banded", "window 40, 4 sinks", ops.banded, slots | dict(window=40, sinks=4)
    more = {"fq_BTHF": tensor(B, T, H, K, low=0), "fk_BXGF": tensor(B, T, G, K, low=0), "mix_BTH": tensor(B, T, H)}
    for kind, gate in gates.items():
        memory = tensor(B, G, K, V + 1, low=0, kind=full)
        yield (
            "window_linear",
            f"decay {kind}",
            ops.window_linear,
            slots | more | dict(log_decay=gate, window=40, sinks=4, initial_state=memory, output_final_state=True),
        )
    numbers = {"fq_BTHF": tensor(B, T, H, K), "fk_BXGF": tensor(B, T, G, K), "mix_BTH": more["mix_BTH"]}
    inside |= dict(window=40, sinks=4, log_decay=gates["scalar"], initial_state=tensor(B, G, 2 * K, V + 1, low=0, kind=full))
    yield "window_linear", "Hedgehog features inside", ops.window_linear, slots | numbers | inside


def results(fn: Callable, arguments: dict, backend: str) -> tuple[list, dict]:
    """(outputs, gradients) of a loss that reads all outputs."""
    given = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    outs = [x for x in fn(**given, backend=backend) if x is not None]
    generator = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=generator).to(x.device, x.dtype)).sum() for x in outs if x.requires_grad).backward()
    return [x.detach() for x in outs], {name: x.grad for name, x in given.items() if isinstance(x, torch.Tensor) and x.grad is not None}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest number wanted; NaN counts as infinite."""
    off = ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-3)).item()
    return off if off == off else float("inf")


def check(op: str, what: str, fn: Callable, arguments: dict, backend: str) -> dict[str, Any]:
    """One row: largest errors of output and gradients against the definition in fp64 on the same numbers, and milliseconds forward and backward."""
    wide = {
        n: x.detach().double().cpu().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()
    }
    dtype = next(iter(arguments.values())).dtype
    row = {"op": op, "what": what, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    try:
        outs, slopes = results(fn, arguments, backend)
    except Exception as error:  # a kernel that does not compile or run here is the finding, not a reason to stop
        return row | {"ok": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    wanted, wanted_slopes = results(fn, wide, "definition")
    output = max(difference(x.cpu(), want) for x, want in zip(outs, wanted, strict=True))
    gradient = max(difference(slopes[name].cpu(), want) for name, want in wanted_slopes.items())
    return row | {
        "output": output,
        "gradient": gradient,
        "milliseconds": clock(lambda: results(fn, arguments, backend)),
        "ok": max(output, gradient) <= TOLERANCE[dtype],
    }


def clock(run: Callable) -> float:
    """Best of three, in milliseconds; the GPU is waited for."""
    best = float("inf")
    for _ in range(3):
        wait()
        began = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - began)
    return round(1000 * best, 3)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels() -> Iterator[dict[str, Any]]:
    """Rows of every op on every backend that can run here: Triton on a GPU (or in Triton's interpreter), C++ and torch on the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    places = (
        [("cpu", ["triton"] if interpreted else ["cpu", "torch"])]
        if interpreted or not torch.cuda.is_available()
        else [("cuda", ["triton", "torch"])]
    )
    for device, backends in places:
        for dtype in (torch.float32,) if interpreted else tuple(TOLERANCE):  # the interpreter is wrong about bf16
            for op, what, fn, arguments in cases(device, dtype):
                for backend in backends:
                    if dispatch.why_not(backend, op, tuple(arguments.values())[:3], BANDED if op == "banded" else {}) is None:
                        yield check(op, what, fn, arguments, backend)


def unchecked() -> str | None:
    """Why the Triton kernels are not among the rows, as a sentence; None when they are."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "The Triton kernels were not checked: they need a GPU. TRITON_INTERPRET=1 runs them here in Triton's interpreter, in fp32 and slowly."


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{'ok' if row['ok'] else 'WRONG':6}{row['op']:14}{row['what']:20}{row['backend']:8}{row['dtype']:10}"
    if "error" in row:
        return head + row["error"]
    return head + f"output {row['output']:.0e}  gradient {row['gradient']:.0e}  {row['milliseconds']:9.2f} ms forward + backward"


def render(found: dict[str, Any]) -> Iterator[str]:
    """The environment for people, line by line."""
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
    yield f"subquad {found['subquad']}, Python {found['python']}, {found['system']}, {found['threads']} threads"
    yield packages
    yield f"not installed: {', '.join(name for name, number in found['packages'].items() if not number) or 'nothing of what is used'}"
    yield f"GPUs: {', '.join(found['gpus']) or 'none'}; C++ compiler: {found['compiler'] or 'none'}"
    yield from findings(found)
