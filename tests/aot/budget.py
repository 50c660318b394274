"""The committed budget: what each kernel may use on each target. `SUBQUAD_AOT=1 python tests/aot/budget.py [--targets sm_80,gfx942] [--cases NAME,..]`
compiles and rewrites its part of budget.json, where a call that spills has no place; test_budget.py compares.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "budget.json"
KEPT = ("registers", "spill", "shared", "instructions", "matrix", "matrix_kind")


def measure(target: str, case: str, seen: dict) -> dict[str, dict]:
    """{kernel, what tells its variants apart, and a number: figures} of one case."""
    import compiler
    from cases import CASES, backward

    function, arguments = CASES[case]
    with compiler.compiling(target, seen) as found:
        backward(function(*arguments))
    rows: dict[str, dict] = {}
    for one in {id(one): one for one in found}.values():
        options = ",".join(f"{key}={int(value)}" for key, value in one.options.items())
        rows[f"{one.kernel}[{options}]#{len(rows)}"] = {key: one.figures[key] for key in KEPT}
    return rows


def configuration(name: str) -> tuple[str, ...]:
    """Kernel, tiles, warps and stages of a row: what an autotuner would choose. Directions, axes and modes are other kernels, not other choices."""
    kernel, _, options = name.partition("[")
    return kernel, *(x for x in options.partition("]")[0].split(",") if x.split("=")[0] in ("warps", "stages", "BT", "BV"))


def load(file: Path = FILE) -> dict:
    """{target: {case: {name: figures}}}"""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save(budget: dict, file: Path = FILE) -> None:
    """A line per kernel, so that a change reads as one."""
    text = ",\n".join(
        f'{json.dumps(target)}: {{\n'
        + ",\n".join(
            f' {json.dumps(case)}: {{\n' + ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n }"
            for case, rows in sorted(cases.items())
        )
        + "\n}"
        for target, cases in sorted(budget.items())
    )  # fmt: skip
    file.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def main() -> None:
    sys.path[:0] = [str(HERE)]
    import conftest  # noqa: F401 - the light package
    from cases import CASES
    from stand_in import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--missing", action="store_true", help="only what the file does not have")
    asked = parser.parse_args()
    seen: dict = {}
    for case in asked.cases.split(","):
        for target in asked.targets.split(","):
            if asked.missing and case in load(asked.file).get(target, {}):
                continue
            rows = measure(target, case, seen)
            for name, row in rows.items():
                print(target, case, name, row, flush=True)
            if any(row["spill"] for row in rows.values()):
                print(target, case, "spills: not kept", flush=True)
                continue
            budget = load(asked.file)
            budget.setdefault(target, {})[case] = rows
            save(budget, asked.file)


if __name__ == "__main__":
    main()
