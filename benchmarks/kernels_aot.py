"""Compiled figures of every Triton kernel for GPUs that are not here, as two tables, from the committed budget (tests/aot/budget.json).

    python benchmarks/kernels_aot.py                        # the tables
    SUBQUAD_AOT=1 python tests/aot/budget.py                # compile everything again and rewrite the budget

First table, a row per kernel and head size, a column per target: the largest number of registers a thread, the largest shared memory a block in KB, bytes
spilled, kinds of matrix instructions, over all its variants (directions, decays, modes). Second table: kernels compiled by one call with its backward
pass, and different choices of tiles, warps and stages among them. Never a time on a GPU.
"""

import sys
from collections import defaultdict
from pathlib import Path

AOT = Path(__file__).parents[1] / "tests/aot"
sys.path.insert(0, str(AOT))

import budget

SHORT = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mfma": "mfma"}


def cell(rows: list[dict]) -> str:
    kinds = sorted({SHORT[kind] for row in rows for kind in row["matrix_kind"].split("+") if kind})
    if not rows:
        return ""
    most = {key: max(row[key] for row in rows) for key in ("registers", "shared", "spill")}
    return f"{most['registers']}, {most['shared'] / 1024:.0f}, {most['spill']} {'+'.join(kinds) or '-'}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    kept = budget.load()
    figures, compiled = defaultdict(list), defaultdict(dict)
    for target, cases in kept.items():
        for case, rows in cases.items():
            size = int(case.rpartition("-")[2])
            for name, row in rows.items():
                figures[name.split("[")[0], size, target].append(row)
            compiled[case][target] = f"{len(rows)} / {len({budget.configuration(name) for name in rows})}"
    kernels = sorted({(kernel, size) for kernel, size, _ in figures})
    print(table(["kernel", "D", *kept], [[f"`{k}`", str(d), *(cell(figures[k, d, t]) for t in kept)] for k, d in kernels]), "\n")
    print(table(["op and D", *kept], [[case, *(compiled[case].get(target, "") for target in kept)] for case in compiled]))


if __name__ == "__main__":
    main()
