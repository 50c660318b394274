"""The committed budget: what each kernel may use on each target. `SUBQUAD_AOT=1 python tests/aot/budget.py [--targets sm_80,gfx942] [--cases NAME,..]`
compiles and rewrites its part of budget.json; test_budget.py compares.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "budget.json"
KEPT = ("registers", "spill", "shared", "instructions", "matrix", "matrix_kind")


def measure(target: str, case: str, seen: dict) -> dict[str, dict]:
    """{kernel and what tells its variants apart: figures} of one case."""
    import compiler
    from cases import CASES

    function, arguments = CASES[case]
    with compiler.compiling(target, seen) as found:
        function(*arguments)
    rows: dict[str, dict] = {}
    for one in found:
        options = ",".join(f"{key}={int(value)}" for key, value in one.options.items())
        rows[f"{one.kernel}[{options}]#{sum(name.startswith(one.kernel) for name in rows)}"] = {key: one.figures[key] for key in KEPT} | {
            "seconds": round(one.seconds, 1)
        }
    return rows


def load(file: Path = FILE) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def main() -> None:
    sys.path[:0] = [str(HERE)]
    import conftest  # noqa: F401 - the light package
    from cases import CASES
    from compiler import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--file", type=Path, default=FILE)
    asked = parser.parse_args()
    seen: dict = {}
    for target in asked.targets.split(","):
        for case in asked.cases.split(","):
            rows = measure(target, case, seen)
            budget = load(asked.file)
            budget.setdefault(target, {})[case] = rows
            asked.file.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            for name, row in rows.items():
                print(target, case, name, row, flush=True)


if __name__ == "__main__":
    main()
