"""Bytes that the Triton kernels move, counted in the corrected interpreter: no GPU, no time.

    python benchmarks/kernels_traffic.py [--tokens 512] [--sizes 64,128] [--ops additive-none,..] [--backward] [--fla] [--json FILE]

One head, bf16, forward (or forward and backward). Unit: the bytes of q, k, v and o once (of window_linear: without its features). Two numbers a row:
  memory    32-byte sectors touched by each launch, once each: what moves between memory and L2 when reuse inside a launch is perfect, between launches none
  L2        32-byte sectors of every access: what moves between L2 and the programs when nothing is reused
--fla adds fla-core's ops of the same function where it is installed: the configurations it considers on compute capability 9.0, of these the one with
the largest tiles. Where two of its ops and a merge are needed (window_linear), the merge is computed, not counted: it reads two outputs and writes one.
hedgehog, hedgehog_window: additive and window_linear with 2 D features made inside of D numbers.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "tests"))

import light_package

light_package.install(HERE / "tests/interp")
import emulator
import fla_peer
import torch

from subquad.kernels.triton import functions

BARS = {"additive-none": 1.3, "additive-scalar": 1.3, "additive-vector": 4, "delta-none": 3, "delta-scalar": 3, "window_linear-none": 1.8,
        "window_linear-scalar": 1.8}  # fmt: skip


OURS = "subquad"
LINE = "{op:20} {call:38} {D:4} {memory:7} {L2:6} {launches:9} {exponentials:10} {flops:19}  {bar}"
MERGE = 3  # tensors of the size of o


def inputs(kind: str, T: int, D: int, backward: bool) -> SimpleNamespace:
    def tensor(*shape, dtype=torch.bfloat16):
        return torch.rand(1, T, 1, *shape).to(dtype).requires_grad_(backward)

    gates = {"scalar": (-tensor(dtype=torch.float32)).detach(), "vector": (-tensor(D, dtype=torch.float32)).detach()}
    x = SimpleNamespace(**{name: tensor(D) for name in ("q", "k", "v", "fq", "fk")}, gate=gates.get(kind), beta=tensor(dtype=torch.float32))
    x.k.data = torch.nn.functional.normalize(x.k.data.float(), dim=-1).bfloat16()  # of longer keys the delta rule's state overflows
    return x


def ours(name: str, x: SimpleNamespace) -> list[torch.Tensor]:
    if name == "additive":
        return [functions.additive(x.q, x.k, x.v, x.gate)[0]]
    if name == "hedgehog":
        return [functions.additive(x.q, x.k, x.v, x.gate, feature_map="hedgehog_softmax")[0]]
    if name == "hedgehog_window":
        return [functions.window_linear(x.q, x.k, x.v, x.fq, x.fk, x.beta, x.gate, window=64, sinks=4, feature_map="hedgehog_softmax")[0]]
    if name == "delta":
        return [functions.delta(x.q, x.k, x.v, x.beta, x.gate)[0]]
    if name == "banded":
        return [functions.banded(x.q, x.k, x.v, window=64, sinks=4)[0]]
    return [functions.window_linear(x.q, x.k, x.v, x.fq, x.fk, x.beta, x.gate, window=64, sinks=4)[0]]


def run(op: str, call: str, T: int, D: int, backward: bool) -> dict:
    torch.manual_seed(0)
    name, _, kind = op.partition("-")
    x = inputs(kind, T, D, backward)
    with emulator.watch(check=False) as seen:
        outs = ours(name, x) if call == OURS else fla_peer.call(call, x)
        if backward:
            sum(out.sum() for out in outs if out is not None).backward()
    unit = 4 * x.q.numel() * x.q.element_size()
    merge = MERGE / 4 if " + " in call else 0
    return {
        "op": op, "call": call, "D": D, "memory": round(seen.fresh / unit + merge, 2), "L2": round(seen.sectors / unit + merge, 2),
        "launches": len(seen.launches) + bool(merge), "exponentials": round(seen.exponentials / T), "flops": round(seen.flops / T),
        "bar": BARS.get(op) if call == OURS else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--ops", default=",".join([*BARS, "banded", "hedgehog-none", "hedgehog_window-none"]))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--fla", action="store_true", help="fla-core's ops as well")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    peers = {}
    if asked.fla and fla_peer.present():
        fla_peer.as_on("sm_90")
        fla_peer.make_interpretable()
        peers = fla_peer.OPS
    elif asked.fla:
        print("fla-core is not installed: subquad alone", file=sys.stderr)
    rows = []
    print(f"{'op':20} {'call':38}    D  memory     L2  launches  exp/token  matmul flops/token  bar")
    for D in map(int, asked.sizes.split(",")):
        for op in asked.ops.split(","):
            for call in (OURS, *peers.get(op, ())):
                row = run(op, call, asked.tokens, D, asked.backward)
                rows.append(row)
                print(LINE.format(**row), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
