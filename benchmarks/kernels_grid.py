"""Every op on every backend against its definition in fp64, forward and every gradient, over the whole grid of tests/kernels/grid.py: the worst errors.

    make kernels-grid                                        # all of it: hours of one core, most of them in the interpreter
    python benchmarks/kernels_grid.py [--backends torch,cpu,triton] [--lengths 1,31] [--ops additive,delta] [--rows FILE]
    python benchmarks/kernels_grid.py --rows FILE --table    # the table of what FILE holds

fp32 inputs; triton runs in the corrected interpreter (tests/interp), in full fp32 products, with bounds checked and on NaN-filled buffers. An error is the
largest difference of a tensor relative to its largest number; a gradient that is zero because large numbers cancel is judged beside the others. FILE keeps a line a
row and backend, and a run goes on where it stopped. The exit code is 1 when an error is above the suite's tolerance.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "tests"))

import light_package

light_package.install(HERE / "tests/interp")
import emulator
import torch
from kernels import grid
from kernels.test_ops import D64, results
from tolerances import OP, OP_GRADIENT, error

from subquad.kernels import ops

BACKENDS = ("torch", "cpu", "triton")


def worst(found, wanted) -> tuple[float, float]:
    """(error of results, error of gradients): the largest of each."""
    (outs, slopes), (wanted_outs, wanted_slopes) = found, wanted
    forward = max(error(x, want) for x, want in zip(outs, wanted_outs, strict=True))
    largest = max(x.abs().max() for x in wanted_slopes.values())
    backward = 0.0
    for name, want in wanted_slopes.items():
        off = error(slopes[name], want)
        if want.abs().max() < 1e-6 * largest:  # cancelled: what is left beside the other gradients, on the scale of its own tolerance
            off = ((slopes[name].double() - want).abs().max() / largest).item() * OP_GRADIENT / 1e-6
        backward = max(backward, off)
    return forward, backward


def name_of(row) -> str:
    """The op, of rows with a feature map inside with "mapped" before it."""
    return f"mapped {row.op}" if row.kind in grid.MAPPED else row.op


def run_row(row: grid.Row, backends: list[str]):
    leaves, other = grid.tensors(row)
    fn = getattr(ops, row.op)
    wanted = results(fn, leaves, other, D64, "definition")
    for backend in backends:
        started = time.process_time()
        with emulator.poisoned():
            if backend == "triton":
                with emulator.watch():
                    found = results(fn, leaves, other, torch.float32, backend)
            else:
                found = results(fn, leaves, other, torch.float32, backend)
        forward, backward = worst(found, wanted)
        yield {"row": str(row), "op": name_of(row), "T": row.T, "backend": backend, "forward": forward, "backward": backward,
               "seconds": round(time.process_time() - started, 1)}  # fmt: skip


def run_step(row: grid.Step, backends: list[str]):
    """The step's output and the state it leaves."""
    fn, wanted = getattr(ops, row.op), grid.step(row, D64)
    want = fn(**wanted, backend="definition")
    for backend in backends:
        started, given = time.process_time(), grid.step(row, torch.float32)
        found = fn(**given, backend=backend)
        forward = max(error(found, want), *(error(given[name], wanted[name]) for name in given if name.startswith("state")))
        yield {"row": str(row), "op": row.op, "T": 1, "backend": backend, "forward": forward, "backward": None,
               "seconds": round(time.process_time() - started, 1)}  # fmt: skip


def load(file: Path | None) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file and file.exists() else []


def table(found: list[dict]) -> str:
    """A row an op, a pair of columns a backend: worst error of results and of gradients, and the number of rows of the grid."""
    cells = defaultdict(list)
    for one in found:
        cells[one["op"], one["backend"]].append(one)
    lines = [f"| op | rows | {' | '.join(BACKENDS)} |", "| --- " * (2 + len(BACKENDS)) + "|"]
    for op in dict.fromkeys(one["op"] for one in found):
        texts = []
        for backend in BACKENDS:
            rows = cells[op, backend]
            slopes = [row["backward"] for row in rows if row["backward"] is not None]
            texts.append(f"{max(row['forward'] for row in rows):.0e}" + (f", {max(slopes):.0e}" if slopes else "") if rows else "")
        lines.append(f"| {op} | {max(len(cells[op, backend]) for backend in BACKENDS)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--lengths", default=",".join(map(str, grid.LENGTHS)))
    parser.add_argument("--ops", default=",".join([*grid.KINDS, *grid.STEPS]))
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--table", action="store_true", help="only print what --rows holds")
    asked = parser.parse_args()
    found = load(asked.rows)
    backends, chosen = asked.backends.split(","), asked.ops.split(",")
    done = {(one["row"], one["backend"]) for one in found}
    lengths = set(map(int, asked.lengths.split(",")))

    def keep(one: dict) -> None:
        found.append(one)
        print(f"{one['backend']:7} {one['forward']:.1e} {one['backward'] or 0:.1e} {one['seconds']:6.1f} s  {one['row']}", flush=True)
        if asked.rows:
            with asked.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")

    rows = [*grid.steps(), *grid.grid()]
    for row in [] if asked.table else [row for row in rows if name_of(row) in chosen and (row.op in grid.STEPS or row.T in lengths)]:
        missing = [backend for backend in backends if (str(row), backend) not in done]
        for one in (run_step if row.op in grid.STEPS else run_row)(row, missing) if missing else []:
            keep(one)
    print(table(found))
    bad = [one for one in found if one["forward"] > OP or (one["backward"] or 0) > OP_GRADIENT]
    for one in bad:
        print("ABOVE THE TOLERANCE", one)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
