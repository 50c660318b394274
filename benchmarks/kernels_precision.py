"""Errors of the Triton kernels in the corrected interpreter against the definition in fp64, per precision: output and every gradient.

    python benchmarks/kernels_precision.py [--tokens 100] [--ops additive,delta]

tf32, tf32x3 and ieee take fp32 inputs; bf16 and fp16 take inputs of that type, compared with fp64 on the same rounded inputs. Largest difference relative to
the largest number of the same tensor.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE / "tests/interp"), str(HERE / "tests"), str(HERE)]

import emulator  # noqa: F401 - before any kernel
import torch
from conftest import package  # noqa: F401
from kernels.test_ops import linear_case, window_case
from tolerances import error

from subquad.kernels import definition
from subquad.kernels.triton import functions

MODES = {"ieee": torch.float32, "tf32x3": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP = ("log_decay", "initial_state")  # fp32 whatever the inputs
NAMES = {"q_BTHK": "q", "k_BTGK": "k", "v_BTGV": "v", "k_BXGK": "k", "v_BXGV": "v", "fq_BTHF": "fq", "fk_BXGF": "fk", "mix_BTH": "mix"}


def case(op: str, T: int) -> tuple[dict, dict]:
    if op == "window_linear":
        leaves, other, more = window_case(T, 32, 32, 1, 2, 16, 2, 0, 0, False, False, 32, "scalar")
        leaves = {NAMES.get(name, name): x for name, x in (leaves | more).items()}
        return leaves, other | {"output_final_state": True}
    leaves, other, g = linear_case(T, 32, 32, 1, 2, "scalar", False, True, unit=op == "delta")
    leaves = {NAMES.get(name, name): x for name, x in leaves.items()} | {"log_decay": g}
    return leaves | ({"beta": torch.rand(2, T, 1, dtype=torch.float64)} if op == "delta" else {}), other


def run(fn, leaves: dict, other: dict) -> dict:
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    outs = fn(**leaves, **other)
    generator = torch.Generator().manual_seed(7)
    sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outs).backward()
    return {"o": outs[0].detach(), "state": outs[1].detach()} | {"d" + name: x.grad for name, x in leaves.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--ops", default="additive,delta,window_linear")
    asked = parser.parse_args()
    for op in asked.ops.split(","):
        leaves, other = case(op, asked.tokens)
        for mode, dtype in MODES.items():
            low = {name: x.to(torch.float32 if name in KEEP else dtype) for name, x in leaves.items()}
            precision = {"input_precision": mode} if dtype == torch.float32 else {}
            found = run(getattr(functions, op), low, other | precision)
            wanted = run(getattr(definition, op), {name: x.double() for name, x in low.items()}, other)
            print(f"{op:14} {mode:7}", *(f"{name} {error(found[name], wanted[name]):.0e}" for name in wanted), flush=True)


if __name__ == "__main__":
    main()
