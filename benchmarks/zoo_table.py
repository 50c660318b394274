"""All constant-memory presets side by side: the same teacher, window, text and layer-local transfer; prints the table of docs/results.md.

    python benchmarks/zoo_table.py --out runs/zoo                       # 100k tokens each; a preset that is done is not done again
    python benchmarks/zoo_table.py --out runs/zoo --tokens 20k --only gla,mala

One model is open; mixers are put in, trained against the teacher's attention outputs, measured and taken out again, so that nothing but the mixer
differs. Rows: teacher, sinks + window, then the presets by perplexity. Rows are kept in OUT/rows.jsonl as they come.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from subquad.distill.data import Tokens
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.evals import evaluate
from subquad.healing import heal
from subquad.inputs import Teacher, read_documents
from subquad.linearize import linearize, plan, restore
from subquad.linearize.mixers import causal
from subquad.linearize.mixers.describe import constant
from subquad.progress import Reporter
from subquad.recipe import Recipe, load_recipe
from subquad.settings import validate

CONTEXT = 32768  # tokens at which bytes are counted
COLUMNS = ("preset", "perplexity", "repeat", "state bytes", "parameters added", "train tokens/s")


def presets(only: str | None) -> list[str]:
    known = [name for name in causal() if constant(name)]
    return known if only is None else [name for name in known if name in only.split(",")]


def measure(model, held_out: Tokens, tasks: dict) -> dict[str, float]:
    ids = torch.from_numpy(held_out.ids.astype("int64"))
    rows = evaluate({"model": lambda: nullcontext(model)}, ids, tasks)
    return {row["metric"]: row["value"] for row in rows}


def one(name: str, model, recipe: Recipe, train: Tokens, held_out: Tokens, out: Path, arguments) -> dict:
    """Train and measure one preset; `model` is the teacher again afterwards."""
    what = plan(model, mixer=name, window=arguments.window, sinks=arguments.sinks)
    torch.manual_seed(recipe.seed)
    student = linearize(model, what)
    stage = {"name": name, "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1.0}, "tokens": arguments.tokens}
    stage = validate(Stage, stage | {"context": arguments.context, "lr": arguments.lr})
    log, began, trained = JsonLog(out / f"{name}.jsonl"), time.monotonic(), 0
    try:
        if what.parameters_added():
            trained = heal(
                student, [stage], train, open_teacher=lambda: None, folder=out / "checkpoints", log=log, seed=recipe.seed, report=Reporter()
            )
        speed = trained / (time.monotonic() - began)
        student.eval()
        found = measure(student, held_out, arguments.tasks)
    finally:
        restore(model)
    return {
        "preset": name,
        **found,
        "state bytes": what.student_bytes(CONTEXT),
        "parameters added": what.parameters_added(),
        "train tokens/s": speed,
    }


def table(rows: list[dict]) -> str:
    first = [row for name in ("teacher", "window") for row in rows if row["preset"] == name]
    rest = sorted((row for row in rows if row not in first), key=lambda row: row["perplexity"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in first + rest:
        cells = [row["preset"], f"{row['perplexity']:.2f}", f"{row['repeat_perplexity']:.2f}", f"{row['state bytes']:,}"]
        lines.append("| " + " | ".join([*cells, f"{row['parameters added']:,}", f"{row['train tokens/s']:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--tokens", default="100k")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--only", help="presets, comma-separated; default: all of constant memory")
    parser.add_argument("--set", action="append", default=[], help="changes to the recipe that gives teacher and text")
    arguments = parser.parse_args()
    arguments.tasks = {"perplexity": {"context": 2048, "windows": 4}, "repeat": {"length": 512, "samples": 2}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("smollm2-135m-window", arguments.set)
    teacher = Teacher(recipe)
    train, held_out = (Tokens.from_documents(part, teacher.tokenizer) for part in read_documents(recipe.data))
    model, kept = teacher.fresh().eval(), arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {row["preset"] for row in rows}
    for name in ["teacher", *presets(arguments.only)]:
        if name in done:
            continue
        if name == "teacher":
            what = plan(model, mixer="window")
            row = {"preset": name, **measure(model, held_out, arguments.tasks), "state bytes": what.teacher_bytes(CONTEXT)}
            row |= {"parameters added": 0, "train tokens/s": 0.0}
        else:
            row = one(name, model, recipe, train, held_out, arguments.out, arguments)
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
