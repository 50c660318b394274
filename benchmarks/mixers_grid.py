"""Every preset in every form against its definition, over all lengths, query groups and head sizes: the worst errors.

    make mixers-grid                                         # all of it: about an hour and a half of one core, continues where it stopped
    python benchmarks/mixers_grid.py [--kinds forms,exact] [--only gla,fox] [--lengths 1,64] [--rows FILE]
    python benchmarks/mixers_grid.py --rows FILE --table [--summary FILE]    # the table of what FILE holds; its rows as JSON lines

Kinds of rows, all with random mixers in fp32 (definitions in fp64) and the functions of the tests (tests/linearize/forms.py, test_mixers.py):

    forms   one call, chunks, steps, left-padded, packed: outputs, gradients of inputs and parameters (`own`: relative to the tensor's own largest number
            alone), the state that is left
    exact   the preset's exact setting against softmax attention, 130 tokens
    large   logits times 30, rows and batches of nothing but padding: outputs and gradients of every form are finite
    bf16    a bf16 model with an fp32 state over 4,096 tokens against fp32 arithmetic, in calls of 64 tokens and (`steps`) of one

The exit code is 1 when an error is above the suite's tolerance.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from linearize import forms
from linearize.test_mixers import WITH_EXACT_START, bf16_run, exact_start
from tolerances import BF16, EXACT_START, error

from subquad.linearize.mixers import MIXERS, causal

KINDS = ("exact", "large", "bf16", "forms", "steps")
ALLOWED = forms.ALLOWED | {"exact": EXACT_START, "bf16": BF16, "large": 0.0}
LARGE, LARGE_T = 30, 24
FORMS = ("one call", "chunks", "steps", "left-padded", "packed")  # variants with a state (", in calls") under the same name


def rows() -> Iterator[tuple[str, forms.Row]]:
    """(kind, row) in the order in which they are run: what is quick, then the grid in three passes."""
    yield from (("exact", forms.Row(case, 130, R, K)) for case in WITH_EXACT_START for R in forms.GROUPS for K in forms.SIZES)
    yield from (("large", row) for row in forms.dealt(0, (LARGE_T,)))
    yield from (("bf16", forms.Row(case, 4096, 1, 64)) for case in causal())
    yield from (("forms", row) for row in forms.grid())
    yield from (("steps", forms.Row(case, 4096, 1, 64)) for case in causal())


def measured(kind: str, row: forms.Row) -> dict[str, dict[str, float]]:
    """Form -> {what: how far off}; what begins with a key of ALLOWED."""
    if kind == "forms":
        return forms.errors(row)
    if kind == "exact":
        return {kind: {"exact": error(*exact_start(row.case, row.R, row.K, row.heads))}}
    if kind == "large":
        return {kind: {"large": 0.0 if forms.never_infinite(row, LARGE) else float("inf")}}
    return {kind: {"bf16": error(*bf16_run(row.case, 64 if kind == "bf16" else 1, row.K, row.heads))}}


def worst(offs: dict[str, float]) -> dict[str, list]:
    """What -> [how far off, the name of the tensor], the largest of each."""
    found: dict[str, list] = {}
    for name, off in offs.items():
        what, _, tensor = name.partition(" ")
        if what not in found or off > found[what][0]:
            found[what] = [float(f"{off:.2g}"), tensor]
    return found


def run_row(kind: str, row: forms.Row) -> dict:
    started = time.process_time()
    found = {form: worst(offs) for form, offs in measured(kind, row).items()}
    return {"row": f"{kind}: {row}", "case": row.case, "found": found, "seconds": round(time.process_time() - started, 2)}


def too_far(one: dict) -> list[str]:
    return [
        f"{form}: {what} {tensor} {off:.1e}"
        for form, whats in one["found"].items() for what, (off, tensor) in whats.items() if not off <= ALLOWED[what]
    ]  # fmt: skip


def summary(found: list[dict]) -> list[dict]:
    """A dict a preset and direction: rows, the worst of each kind of error, the worst of each form."""
    lines = []
    for case in dict.fromkeys(one["case"] for one in found):
        mine = [one for one in found if one["case"] == case]
        offs = [(form, what, off) for one in mine for form, whats in one["found"].items() for what, (off, _) in whats.items()]
        line = {"case": case, "rows": len(mine), "seconds": round(sum(one["seconds"] for one in mine))}
        line |= {kind: max(known) for kind in ALLOWED if (known := [off for _, what, off in offs if what == kind])}
        for name in FORMS:
            known = [off for form, _, off in offs if form == name or form.startswith(name + ",")]
            line |= {name: max(known)} if known else {}
        lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    columns = [*ALLOWED, *FORMS]
    shown = ["| preset | rows | " + " | ".join(columns) + " |", "| --- " * (2 + len(columns)) + "|"]
    for line in lines:
        cells = [("" if name not in line else f"{line[name]:.0e}" if line[name] else "0") for name in columns]
        shown.append(f"| {line['case']} | {line['rows']} | {' | '.join(cells)} |")
    return "\n".join(shown)


def load(file: Path | None) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file and file.exists() else []


def write(file: Path | None, lines: list[dict], mode: str) -> None:
    if file:
        with file.open(mode, encoding="utf-8") as opened:
            opened.writelines(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", default=",".join(MIXERS), help="presets, in all their directions")
    parser.add_argument("--lengths", default=",".join(map(str, forms.LENGTHS)), help="of the rows `forms`")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--table", action="store_true", help="only print what --rows holds")
    parser.add_argument("--summary", type=Path, help="write the table's rows here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = load(asked.rows)
    kinds, only, lengths = asked.kinds.split(","), asked.only.split(","), set(map(int, asked.lengths.split(",")))
    done = {one["row"] for one in found}
    for kind, row in [] if asked.table else rows():
        wanted = kind in kinds and row.case.split(",")[0] in only and (kind != "forms" or row.T in lengths)
        if not wanted or f"{kind}: {row}" in done:
            continue
        found.append(run_row(kind, row))
        write(asked.rows, found[-1:], "a")
        print(f"{found[-1]['seconds']:6.1f} s  {found[-1]['row']}  {'; '.join(too_far(found[-1])) or 'within'}", flush=True)
    lines = summary(found)
    write(asked.summary, lines, "w")
    print(table(lines))
    bad = [(one["row"], what) for one in found for what in too_far(one)]
    for row, what in bad:
        print("ABOVE THE TOLERANCE", row, what)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
