"""Compiled figures of every Triton kernel for GPUs that are not here, as a table, from the committed budget (tests/aot/budget.json).

    python benchmarks/kernels_aot.py             # the table, and cold start: kernels compiled and seconds, summed per op and target
    python tests/aot/budget.py                   # compile everything again and rewrite the budget (use an empty TRITON_CACHE_DIR for the seconds)

spill: bytes to local memory, loads and stores together. shared: bytes a block. matrix: number and kind of tensor-core instructions. Never a time on a GPU.
"""

import json
from collections import defaultdict
from pathlib import Path

BUDGET = Path(__file__).parents[1] / "tests/aot/budget.json"


def main() -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    cold = defaultdict(lambda: [0, 0.0])
    print("target   case                     kernel                      registers  spill  shared  instructions  matrix")
    for target, cases in budget.items():
        for case, rows in cases.items():
            for name, row in rows.items():
                kernel = name.split("[")[0]
                print(f"{target:8} {case:24} {kernel:27} {row['registers']:9} {row['spill']:6} {row['shared']:7} {row['instructions']:13}"
                      f"  {row['matrix']} {row['matrix_kind']}")  # fmt: skip
                cold[target, case][0] += 1
                cold[target, case][1] += row["seconds"]
    print("\ncold start (forward and backward)\ntarget   case                     kernels  seconds")
    for (target, case), (count, seconds) in cold.items():
        print(f"{target:8} {case:24} {count:7} {seconds:8.1f}")


if __name__ == "__main__":
    main()
