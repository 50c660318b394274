"""Errors of the Triton kernels in the corrected interpreter against the definition in fp64, per precision: output, final state and every gradient.

    python benchmarks/kernels_precision.py [--tokens 100] [--size 64] [--ops additive-none,..] [--modes ieee,..] [--fla] [--json FILE]

tf32, tf32x3 and ieee take fp32 inputs; bf16 and fp16 take inputs of that type, compared with fp64 on the same rounded inputs. Largest difference relative to
the largest number of the same tensor. --fla adds fla-core's ops of the same function where it is installed, in the modes it has: tf32 for fp32 inputs, bf16.
At the end a table: output / the largest error of a gradient, and which.

Key: T tokens, D head size.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE / "tests"), str(HERE)]

import light_package

light_package.install(HERE / "tests/interp")
import emulator  # noqa: F401 - before any kernel
import fla_peer
import torch
from kernels.test_ops import linear_case, window_case
from tolerances import error

from subquad.kernels import definition
from subquad.kernels.triton import functions

OPS = ("additive-none", "additive-scalar", "additive-vector", "delta-none", "delta-scalar", "banded", "window_linear-none", "window_linear-scalar",
       "window_linear-vector")  # fmt: skip
MODES = {"ieee": torch.float32, "tf32x3": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP = ("log_decay", "initial_state", "beta")  # fp32 whatever the inputs
PEERS = {op: names[-1] for op, names in fla_peer.OPS.items() if not op.startswith(("window_linear", "banded"))}  # of the others none has our sinks
PEER_MODES = ("tf32", "bf16")


def case(op: str, T: int, D: int) -> tuple[dict, dict]:
    """Leaves by the names of the arguments, fp64, without those that are missing; and what is not differentiated."""
    name, _, kind = op.partition("-")
    if name in ("banded", "window_linear"):
        leaves, other, more = window_case(T, D, D, 1, 2, 16, 2, 0, 0, False, False, D, kind or "none")
        leaves, other = (leaves | more, other | {"output_final_state": True}) if kind else (leaves, other)
    else:
        leaves, other, g = linear_case(T, D, D, 1, 1, kind, False, True, unit=name == "delta")
        leaves |= {"log_decay": g} | ({"beta": torch.rand(2, T, 1, dtype=torch.float64)} if name == "delta" else {})
    short = {key.rpartition("_")[0] if key.rpartition("_")[2].isupper() else key: x for key, x in leaves.items() if x is not None}
    return short, other


def run(fn, leaves: dict, other: dict, names: tuple[str, ...]) -> dict:
    """Outputs and gradients by name; the loss reads every differentiable output."""
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    outs = [x for x in fn(**leaves, **other) if x is not None]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outs]
    sum((x * w.to(x.dtype)).sum() for x, w in zip(outs, weights, strict=True) if x.requires_grad).backward()
    return dict(zip(names, (x.detach() for x in outs), strict=True)) | {"d" + name: x.grad for name, x in leaves.items()}


def peer(name: str):
    """fla's op with the arguments of ours."""

    def fn(q, k, v, log_decay=None, beta=None, *, initial_state, scale, output_final_state, cu_seqlens):
        x = SimpleNamespace(q=q, k=k, v=v, gate=log_decay, beta=beta)
        return fla_peer.call(name, x, scale=scale, initial_state=initial_state, output_final_state=output_final_state)

    return fn


def row(op: str, call: str, mode: str, leaves: dict, other: dict) -> dict:
    """Errors of one call in one precision."""
    low = {name: x.to(torch.float32 if name in KEEP else MODES[mode]) for name, x in leaves.items()}
    function = op.partition("-")[0]
    names = ("o", "denominator", "maximum") if function == "banded" else ("o", "state")
    if call == "subquad":
        precision = {"input_precision": mode} if MODES[mode] == torch.float32 else {}
        found = run(getattr(functions, function), low, other | precision, names)
    else:
        found = run(peer(call), low, other, names)
    wanted = run(getattr(definition, function), {name: x.double() for name, x in low.items()}, other, names)
    return {"op": op, "call": call, "mode": mode, "errors": {name: error(found[name], wanted[name]) for name in wanted}}


def cell(errors: dict[str, float]) -> str:
    worst = max((name for name in errors if name.startswith("d")), key=errors.get)
    return f"{errors['o']:.0e} / {errors[worst]:.0e} {worst[1:]}"


def table(rows: list[dict], modes: list[str]) -> str:
    lines = [["op", "", *modes], ["---"] * (len(modes) + 2)]
    for op, call in dict.fromkeys((one["op"], one["call"]) for one in rows):
        cells = {one["mode"]: cell(one["errors"]) for one in rows if (one["op"], one["call"]) == (op, call)}
        lines.append([op, call, *(cells.get(mode, "") for mode in modes)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--fla", action="store_true", help="fla-core's ops as well")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with_fla = asked.fla and fla_peer.present()
    if asked.fla and not with_fla:
        print("fla-core is not installed: subquad alone", file=sys.stderr)
    if with_fla:
        fla_peer.as_on("sm_90")
        fla_peer.make_interpretable()
    modes, rows = asked.modes.split(","), []
    for op in asked.ops.split(","):
        leaves, other = case(op, asked.tokens, asked.size)
        for call in ("subquad", *([PEERS[op]] if with_fla and op in PEERS else ())):
            for mode in modes:
                if call != "subquad" and (mode not in PEER_MODES or (call, mode) == ("chunk_delta_rule", "tf32")):  # which refuses fp32
                    continue
                rows.append(row(op, call, mode, leaves, other))
                print(f"{op:20} {call:24} {mode:7}", *(f"{name} {value:.0e}" for name, value in rows[-1]["errors"].items()), flush=True)
    print("\n" + table(rows, modes))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
