"""All constant-memory presets side by side: the same teacher, window, text and layer-local transfer; prints the table of docs/results.md.

    python benchmarks/zoo_table.py --out runs/zoo                       # 100k tokens each; a preset that is done is not done again
    python benchmarks/zoo_table.py --out runs/zoo --tokens 20k --only gla,mala
    python benchmarks/zoo_table.py --out runs/zoo --print               # the table of what is done so far

Presets are trained in groups that share the teacher's pass (side_by_side.py); then each is put into the model, measured and taken out.
Rows are kept in OUT/rows.jsonl as they come. Train tokens/s: tokens / (CPU seconds of the preset's own forward, backward and update + CPU seconds of the
teacher's passes, counted in full for each), so that the speed is that of a preset trained alone; beside it the same relative to the teacher's passes of
that group alone, which may be compared between machines. Run it with one thread.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from side_by_side import Runner, make_runner, put_in, train

from subquad.distill.data import Batches, Tokens
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.evals import evaluate
from subquad.inputs import Teacher, read_documents
from subquad.linearize import plan, restore
from subquad.linearize.mixers import causal
from subquad.linearize.mixers.describe import constant
from subquad.progress import Reporter
from subquad.recipe import load_recipe
from subquad.settings import validate

CONTEXT = 32768  # tokens at which bytes are counted
COLUMNS = ("preset", "perplexity", "repeat", "state bytes", "parameters added", "train tokens/s", "of the teacher's", "attention error")
TASKS = {"perplexity": {"context": 1024, "windows": 4}, "repeat": {"length": 512, "samples": 2}}


def presets(only: str | None) -> list[str]:
    known = [name for name in causal() if constant(name)]
    return known if only is None else [name for name in known if name in only.split(",")]


def measure(model, held_out: torch.Tensor) -> dict[str, float]:
    rows = evaluate({"model": lambda: nullcontext(model)}, held_out, TASKS)
    return {row["metric"]: row["value"] for row in rows}


def teacher_row(model, held_out: torch.Tensor) -> dict:
    row = {"preset": "teacher", **measure(model, held_out), "state bytes": plan(model, mixer="window").teacher_bytes(CONTEXT)}
    return row | {"parameters added": 0, "train tokens/s": 0.0}


def row_of(runner: Runner, teacher_seconds: float, model, stage: Stage, held_out: torch.Tensor) -> dict:
    """What is said of a preset after its training; one that failed has a note in the place of its numbers."""
    trained = runner.steps * stage.batch * stage.context
    row = {"preset": runner.name, "state bytes": runner.plan.student_bytes(CONTEXT), "parameters added": runner.plan.parameters_added()}
    teacher = teacher_seconds * runner.steps / stage.steps
    row |= {"train tokens/s": trained / (runner.seconds + teacher) if trained else 0.0, "tokens": trained}
    row |= {"teacher tokens/s": trained / teacher} if trained else {}
    if runner.failed:
        return row | {"note": runner.failed}
    began = time.process_time()
    try:
        found = measure(put_in(model, runner).eval(), held_out)
    finally:
        restore(model)
    return row | found | {"attention error": runner.loss, "own seconds": runner.seconds, "measured in": time.process_time() - began}


def table(rows: list[dict]) -> str:
    """Teacher and sinks + window first, the others by perplexity, those without numbers last."""
    first = [row for name in ("teacher", "window") for row in rows if row["preset"] == name]
    rest = sorted((row for row in rows if row not in first), key=lambda row: row.get("perplexity", float("inf")))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in first + rest:
        values = [f"{row['perplexity']:.2f}", f"{row['repeat_perplexity']:.2f}"] if "perplexity" in row else [row["note"], ""]
        speed, share = (f"{row['train tokens/s']:.0f}", f"{row['train tokens/s'] / row['teacher tokens/s']:.2f}") if row["train tokens/s"] else ("", "")
        error = f"{row['attention error']:.3f}" if row.get("attention error") else ""
        sizes = [f"{row['state bytes']:,}", f"{row['parameters added']:,}"]
        lines.append("| " + " | ".join([row["preset"], *values, *sizes, speed, share, error]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--tokens", default="100k")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--group", type=int, default=6, help="presets that share the teacher's pass")
    parser.add_argument("--only", help="presets, comma-separated; default: all of constant memory")
    parser.add_argument("--set", action="append", default=[], help="changes to the recipe that gives teacher and text")
    parser.add_argument("--print", action="store_true", help="print the table of what is done and stop")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = JsonLog(arguments.out / "rows.jsonl")
    if not arguments.print:
        run(arguments, log)
    print(table(log.rows()))


def run(arguments, log: JsonLog) -> None:
    def write(row: dict) -> None:
        log.write(row)
        print(row, flush=True)

    recipe = load_recipe("smollm2-135m-window", arguments.set)
    teacher = Teacher(recipe)
    text, held_out = (Tokens.from_documents(part, teacher.tokenizer) for part in read_documents(recipe.data))
    model, held_out = teacher.fresh().eval(), held_out.long()
    stage = {"name": "transfer", "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1.0}, "tokens": arguments.tokens}
    stage = validate(Stage, stage | {"context": arguments.context, "lr": arguments.lr})
    batches = Batches(text, context=stage.context, batch=stage.batch, seed=recipe.seed)
    done = {row["preset"] for row in log.rows()}
    if "teacher" not in done:
        write(teacher_row(model, held_out))
    missing = [name for name in presets(arguments.only) if name not in done]
    for names in (missing[i : i + arguments.group] for i in range(0, len(missing), arguments.group)):
        runners = [make_runner(model, name, recipe.seed, window=arguments.window, sinks=arguments.sinks) for name in names]
        seconds = 0.0
        if any(runner.parameters for runner in runners):
            with Reporter().track(", ".join(names), stage.steps) as tick:
                seconds = train(model, runners, stage, batches, tick)
        for runner in runners:
            write(row_of(runner, seconds, model, stage, held_out))


if __name__ == "__main__":
    main()
