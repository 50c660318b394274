"""fla-core's ops that compute the functions of ours, for the comparisons in this folder. fla-core (0.6) is not a dependency: `present()` says whether it is
there, and the scripts do without.

Its modules read the GPU when they are imported and choose their lists of configurations by it, so `as_on(target)` comes first, once a process.

Key: B batch, T tokens, H heads, D head size; q, k, v, fq, fk [B, T, H, D], beta [B, T, H], gate None, [B, T, H] or [B, T, H, D].
"""

import contextlib
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests/aot"))

from stand_in import SHARED_LIMIT, StandIn

CARDS = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200", "gfx942": "AMD Instinct MI300X"}
OPS = {
    "additive-none": ("fused_chunk_simple_gla", "chunk_simple_gla"),
    "additive-scalar": ("fused_chunk_simple_gla", "chunk_simple_gla"),
    "additive-vector": ("chunk_gla",),
    "delta-none": ("chunk_delta_rule",),
    "delta-scalar": ("chunk_gated_delta_rule",),
    "window_linear-none": ("parallel_attn + fused_chunk_simple_gla",),
    "window_linear-scalar": ("parallel_attn + fused_chunk_simple_gla",),
    "banded": ("parallel_attn",),
}
WINDOW = 64


def present() -> bool:
    return all(importlib.util.find_spec(name) for name in ("triton", "fla", "einops"))


class Tuning(StandIn):
    """A stand-in that an autotuner can ask: every configuration is called once, and none is faster than another."""

    def __init__(self, name: str):
        super().__init__(name)
        self.failed = 0  # configurations that could not be compiled

    def get_benchmarker(self):
        def once(call, quantiles=(0.5,), **_):
            try:
                call()
            except Exception:
                self.failed += 1
                raise
            return [1.0] * len(quantiles)

        return once


def as_on(target: str) -> Tuning:
    """Let triton and torch.cuda answer for a GPU that is not here; gives the driver."""
    from triton.runtime.driver import driver

    gpu = Tuning(target)
    driver.set_active(gpu)
    shared = SHARED_LIMIT[target]
    card = SimpleNamespace(shared_memory_per_block_optin=shared, shared_memory_per_block=49152, multi_processor_count=132)
    answers = {
        "get_device_capability": gpu.get_device_capability(), "get_device_name": CARDS[target], "get_device_properties": card,
        "current_device": 0, "device_count": 1, "device": contextlib.nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    return gpu


def call(name: str, x: SimpleNamespace, scale: float = 1.0, **more) -> list[torch.Tensor]:
    """Outputs of fla's op (or ops, joined by +) on x.q, x.k, x.v, x.fq, x.fk, x.beta, x.gate; more: initial_state, output_final_state.

    window_linear needs two: attention over the window and linear attention over all tokens. They do not compute our function: nothing joins them or
    leaves the window out of the second, and there are no sinks.
    """
    import fla.ops as ops

    if " + " in name:
        first, second = name.split(" + ")
        features = SimpleNamespace(**{**vars(x), "q": x.fq, "k": x.fk})
        return call(first, x, scale, **more) + call(second, features, scale, **more)
    if name == "parallel_attn":
        return [ops.parallel_attn(x.q, x.k, x.v, scale=scale, window_size=WINDOW)]
    if name == "chunk_gla":
        return list(ops.chunk_gla(x.q, x.k, x.v, x.gate, scale=scale, **more))
    if name == "chunk_delta_rule":
        return list(ops.chunk_delta_rule(x.q, x.k, x.v, x.beta.to(x.q.dtype), scale=scale, **more))
    if name == "chunk_gated_delta_rule":
        return list(ops.chunk_gated_delta_rule(x.q, x.k, x.v, x.gate, x.beta, scale=scale, **more))
    return list(getattr(ops, name)(x.q, x.k, x.v, x.gate, scale=scale, **more))


def largest_tiles(configurations: list):
    """The configuration with the largest product of tile sizes, the first of several: it moves the fewest bytes."""
    return max(configurations, key=lambda one: math.prod(size for size in one.kwargs.values() if type(size) is int and size > 0))


def make_interpretable() -> None:
    """Let fla's kernels run in tests/interp/emulator.py, which the caller has imported: variables of `range` are int32 tensors as in compiled kernels
    (the stock interpreter gives Python's integers, which have no `.to`), and an autotuner takes the configuration with the largest tiles.
    """
    import ast

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    def number(bound) -> int:
        return int(bound.handle.data.item() if isinstance(bound, tl.tensor) else getattr(bound, "value", bound))

    def looping(*bounds, **_):
        for i in range(*map(number, bounds)):
            yield tl.tensor(interpreter.TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)

    def visit_For(transformer, node):
        transformer.generic_visit(node)
        loop = node.iter
        if isinstance(loop, ast.Call) and (getattr(loop.func, "id", None) == "range" or getattr(loop.func, "attr", None) == "range"):
            loop.func = ast.copy_location(ast.Name("looping", ast.Load()), loop.func)
        return node

    def run(tuner, *args, **kwargs):
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        chosen = largest_tiles(tuner.prune_configs(kwargs))
        return tuner.fn.run(*args, **kwargs, **chosen.all_kwargs())

    interpreter.looping = looping  # rewritten kernels find it with the interpreter's other names
    interpreter.ASTTransformer.visit_For = visit_For
    Autotuner.run = run
