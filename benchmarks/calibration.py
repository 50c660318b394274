"""What start values from the teacher's layer are worth (subquad/linearize/mixers/calibration.py): presets with and without each, before and after training.

    python benchmarks/calibration.py --out runs/starts --windows 0                                        # untrained, errors only
    python benchmarks/calibration.py --out runs/trained --starts before,all --every --tokens 10k --group 2    # and after 10k tokens of transfer

Attention error: the transfer loss on held-out text, mean over layers. Perplexity: of the whole student on held-out text, as a ratio to the teacher's.
All starts of a preset are the same seed and share the teacher's passes. Rows are kept in OUT/rows.jsonl; what is there is not measured again.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from side_by_side import Runner, attention_errors, make_runner, put_in, recording, train

from subquad.distill.data import Batches, Tokens
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.evals import evaluate
from subquad.inputs import Teacher, read_documents
from subquad.linearize import restore
from subquad.linearize.mixers import MIXERS
from subquad.linearize.mixers.calibration import CONCENTRATION
from subquad.linearize.mixers.knobs import DEFAULTS, rows_of
from subquad.linearize.modes import calibrate
from subquad.progress import Reporter
from subquad.recipe import load_recipe
from subquad.settings import validate

PRESETS = "window_linear,gla,gated_delta,hedgehog_softmax2,linear,lln,transformer_vq,mamba2,retnet,gated_linear"
NONE = dict(fit_share=False, fit_map=False, fit_concentration=False, fit_decay=False)
STARTS = {
    "before": NONE,  # as before there were these: joint normalisers start at a tenth
    "share": {**NONE, "fit_share": True},
    "map": {**NONE, "fit_map": True},
    "concentration": {**NONE, "fit_concentration": True},
    "decay": {**NONE, "fit_decay": True},
    "all": {},  # the defaults
}


def applies(name: str, start: str) -> bool:
    """The preset has something that this start sets, and not only what another start of the table sets as well."""
    rows = rows_of({**DEFAULTS, **MIXERS[name].pieces})
    has = {
        "share": rows.combine.gate == "mix",
        "map": bool(rows.feature_map.fit),
        "concentration": rows.feature_map.fit in CONCENTRATION,
        "decay": rows.decay.fits,
        "before": True,
    }
    return has[start] if start in has else has["share"] and has["map"]


def perplexity(model, held_out: torch.Tensor, arguments) -> float:
    tasks = {"perplexity": {"context": arguments.eval_context, "windows": arguments.windows}}
    return evaluate({"model": lambda: nullcontext(model)}, held_out, tasks)[0]["value"]


def student_perplexity(model, runner: Runner, held_out: torch.Tensor, arguments) -> float:
    try:
        return perplexity(put_in(model, runner).eval(), held_out, arguments)
    finally:
        restore(model)


def table(rows: list[dict]) -> str:
    columns = ("error", "ratio", "error after", "ratio after")
    lines = ["| preset | start | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for row in rows:
        values = [f"{row[name]:.4f}" if name in row else "" for name in columns]
        lines.append("| " + " | ".join([row["preset"], row["start"], *values]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--presets", default=PRESETS)
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--tokens", help="of layer-local transfer; default: untrained only")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--windows", type=int, default=1, help="of held-out text for perplexity; 0: none")
    parser.add_argument("--eval-context", type=int, default=1024)
    parser.add_argument("--group", type=int, default=4, help="presets that share the teacher's passes")
    parser.add_argument("--every", action="store_true", help="also starts that change nothing in a preset, or no more than another start")
    parser.add_argument("--set", action="append", default=[], help="changes to the recipe that gives teacher and text")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = JsonLog(arguments.out / "rows.jsonl")
    run(arguments, log)
    print(table(log.rows()))


def run(arguments, log: JsonLog) -> None:
    recipe = load_recipe("smollm2-135m-window", arguments.set)
    teacher = Teacher(recipe)
    text, held_out = (Tokens.from_documents(part, teacher.tokenizer) for part in read_documents(recipe.data))
    model, held_out = teacher.fresh().eval(), held_out.long()
    done = {(row["preset"], row["start"]) for row in log.rows()}
    presets, starts = arguments.presets.split(","), arguments.starts.split(",")
    base = perplexity(model, held_out, arguments) if arguments.windows else 0.0
    for i in range(0, len(presets), arguments.group):
        pairs = [(name, start) for name in presets[i : i + arguments.group] for start in starts]
        names = [pair for pair in pairs if pair not in done and (arguments.every or applies(*pair))]
        if not names:
            continue
        for row in measure(arguments, recipe, model, text, held_out, names, base):
            log.write(row)
            print(row, flush=True)


def measure(arguments, recipe, model, text: Tokens, held_out: torch.Tensor, names: list[tuple[str, str]], base: float) -> list[dict]:
    """A row for each (preset, start)."""
    stage = {"name": "transfer", "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1.0}, "lr": arguments.lr}
    stage = validate(Stage, stage | {"tokens": arguments.tokens or arguments.context, "context": arguments.context})
    batches = Batches(text, context=stage.context, batch=stage.batch, seed=recipe.seed)
    blocks = held_out[-2 * arguments.context :].view(2, -1)  # not those of the perplexity
    runners = [make_runner(model, name, recipe.seed, options=STARTS[start]) for name, start in names]
    rows = [{"preset": name, "start": start} for name, start in names]

    def look(suffix: str) -> None:
        for row, runner, error in zip(rows, runners, attention_errors(model, runners, blocks), strict=True):
            row["error" + suffix] = error
            if arguments.windows:
                row["ratio" + suffix] = student_perplexity(model, runner, held_out, arguments) / base

    with recording(model, runners) as (student, _):
        calibrate(student, batches[0])
    look("")
    if arguments.tokens:
        with Reporter().track(", ".join(sorted({name for name, _ in names})), stage.steps) as tick:
            train(model, runners, stage, batches, tick)
        look(" after")
    return rows


if __name__ == "__main__":
    main()
