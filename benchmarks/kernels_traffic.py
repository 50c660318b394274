"""Bytes that the Triton kernels move, counted in the corrected interpreter: no GPU, no time.

    python benchmarks/kernels_traffic.py [--tokens 512] [--sizes 64,128] [--ops additive-none,..] [--backward] [--json FILE]

One head, bf16, forward (or forward and backward). Unit: the bytes of q, k, v and o once (of window_linear: without its features). Two numbers a row:
  memory    32-byte sectors touched by each launch, once each: what moves between memory and L2 when reuse inside a launch is perfect, between launches none
  L2        32-byte sectors of every access: what moves between L2 and the programs when nothing is reused
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "tests"))

import light_package

light_package.install(HERE / "tests/interp")
import emulator
import torch

from subquad.kernels.triton import functions

BARS = {"additive-none": 1.3, "additive-scalar": 1.3, "additive-vector": 4, "delta-none": 3, "delta-scalar": 3, "window_linear-none": 1.8,
        "window_linear-scalar": 1.8}  # fmt: skip


def inputs(T: int, D: int, backward: bool):
    def tensor(*shape, dtype=torch.bfloat16):
        return torch.rand(1, T, 1, *shape).to(dtype).requires_grad_(backward)

    gates = {"none": None, "scalar": (-tensor(dtype=torch.float32)).detach(), "vector": (-tensor(D, dtype=torch.float32)).detach()}
    return [tensor(D) for _ in range(5)], gates, tensor(dtype=torch.float32)


def run(op: str, T: int, D: int, backward: bool) -> dict:
    torch.manual_seed(0)
    name, _, kind = op.partition("-")
    (q, k, v, fq, fk), gates, beta = inputs(T, D, backward)
    with emulator.watch(check=False) as seen:
        if name == "additive":
            out = functions.additive(q, k, v, gates[kind])[0]
        elif name == "delta":
            out = functions.delta(q, k, v, beta, gates[kind])[0]
        elif name == "banded":
            out = functions.banded(q, k, v, window=64, sinks=4)[0]
        else:
            out = functions.window_linear(q, k, v, fq, fk, beta, gates[kind], window=64, sinks=4)[0]
        if backward:
            out.sum().backward()
    unit = 4 * q.numel() * q.element_size()
    return {
        "op": op, "D": D, "memory": round(seen.fresh / unit, 2), "L2": round(seen.sectors / unit, 2), "launches": len(seen.launches),
        "exponentials": round(seen.exponentials / T), "flops": round(seen.flops / T), "bar": BARS.get(op),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--ops", default=",".join([*BARS, "banded"]))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    print("op                      D  memory     L2  launches  exp/token  matmul flops/token  bar")
    for D in map(int, asked.sizes.split(",")):
        for op in asked.ops.split(","):
            row = run(op, asked.tokens, D, asked.backward)
            rows.append(row)
            print("{op:20} {D:4} {memory:7} {L2:6} {launches:9} {exponentials:10} {flops:19}  {bar}".format(**row), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
