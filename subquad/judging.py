"""What `subquad eval` does: open a student and its teacher, ask them, keep every answer, write the results whole or not at all; and compare two
such results.

OUT/answers.jsonl (evals/answers.py)  results.json (rows)  items.json (scores by item)  about.json (models, text, versions)
"""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from subquad.distill.data import Tokens, load_documents
from subquad.errors import UserError
from subquad.evals import TASKS, task_settings
from subquad.evals.answers import Answers
from subquad.evals.paired import difference
from subquad.evals.rows import METRICS
from subquad.evals.suites import named, suite, with_files
from subquad.folder import as_rows, check_folder, mapping, read_json, write_text
from subquad.leakage import overlap_of
from subquad.linearize import hub
from subquad.linearize.teacher import load_teacher
from subquad.progress import Reporter
from subquad.registry import check_name
from subquad.settings import apply_sets
from subquad.verbs import Rows, check_tasks, measure, open_student, original_teacher, untrained_window, versions

WHO = ("teacher", "window", "student")
RESULTS, ITEMS, ABOUT = "results.json", "items.json", "about.json"


def chosen_tasks(
    tasks: str | None, suite_name: str | None, sets: list[str], benchmarks: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """{task: settings} of the words on the command line; --set has the last word. Empty where nothing is said. UserError where what is said leaves
    no task, or no task that takes the limit."""
    found = suite(suite_name) if suite_name else {}
    found |= named([name.strip() for name in tasks.split(",") if name.strip()], benchmarks) if tasks is not None else {}
    found |= {name: {} for name in apply_sets({}, sets) if name in TASKS and name not in found}
    if limit is not None:
        if not (limited := [name for name in found if _takes_limit(name)]):
            raise UserError(f"--limit {limit}: no task asked for takes one. Those that do: {', '.join(filter(_takes_limit, TASKS))}.")
        for name in limited:
            found[name]["limit"] = limit
    chosen = apply_sets(found, sets)
    if chosen and all(settings is None for settings in chosen.values()):
        raise UserError(f"--set leaves out {', '.join(chosen)}, and nothing else is asked for. Choose tasks with --tasks or --suite.")
    return with_files(chosen, benchmarks)


def _takes_limit(task: str) -> bool:
    return "limit" in task_settings(task)


def judge_folder(
    name: str,
    tasks: dict[str, Any],
    data: list[str],
    *,
    teacher: str | None = None,
    who: list[str] | None = None,
    out: Path | None = None,
    report: Reporter,
) -> Rows:
    """Rows of the model in `name` on `tasks`: a student beside its teacher and the untrained window, any other model alone. No tasks:
    DEFAULT_TASKS, which compare a student with its teacher.

    out: the folder that keeps answers and results; the same call goes on where an earlier one stopped. UserError before a model is opened for
    what can be known without one.
    """
    for one in who or ():
        check_name("model of --models", one, WHO)
    if out is not None:
        check_folder(out)
    documents = load_documents(data)
    is_student = Path(name).is_dir() and hub.is_student(name)
    student, tokenizer = open_student(Path(name)) if is_student or not tasks else load_teacher(name)
    tokens = Tokens.from_documents(documents, tokenizer)
    tasks = check_tasks(tasks or None, tokens, tokenizer)
    models = {"student" if is_student else "model": student}
    if is_student and who != ["student"]:
        exact = original_teacher(student, teacher)
        models = {"teacher": exact, "window": untrained_window(exact, student), **models}
    if is_student and who:
        models = {one: models[one] for one in WHO if one in who}
    answers = Answers(out, log=report.line)
    try:
        if len(answers):
            report.line(f"{out} holds {len(answers)} answers of an earlier call; going on from there.")
        rows = measure(models, tokens, tasks, tokenizer, report, answers)
        if out is not None:
            files = overlap_of(getattr(student, "subquad_provenance", {}), tasks)
            about = {"model": name, "models": {who: answers.mark(model) for who, model in models.items()}, "tasks": tasks,
                     "text_sha256": tokens.sha256, "overlap": files, "versions": versions()}  # fmt: skip
            for entry, value in ((ITEMS, answers.items), (ABOUT, about), (RESULTS, rows)):
                write_text(
                    out / entry, json.dumps(value, indent=1 if value is not answers.items else None, ensure_ascii=False, default=str) + "\n"
                )
    finally:
        answers.close()
    return rows


# ---- comparing ---------------------------------------------------------------------------------------------------------------------------


def compare(first: str | Path, second: str | Path) -> list[dict[str, Any]]:
    """Rows of both results: model, metric, setting, before, after, difference (after - before), stderr (of the paired difference where the same
    items were kept, else of independent ones, else None), better (True, False, or None for what is within two standard errors or not known).

    UserError when a folder holds no results or they share no row.
    """
    (rows_a, items_a), (rows_b, items_b) = _results(first), _results(second)
    before = {(row["model"], row["metric"], row["setting"]): row for row in rows_a}
    found = []
    for row in rows_b:
        same = (row["model"], row["metric"], row["setting"])
        if same not in before or row["value"] is None or before[same]["value"] is None:
            continue
        gap, error, how = row["value"] - before[same]["value"], None, ""
        scores = [items.get(row["metric"], {}).get(row["setting"], {}).get(row["model"]) for items in (items_a, items_b)]
        if all(scores) and len(scores[0]) == len(scores[1]):
            error, how = difference(scores[1], scores[0])[1], "paired"
        elif row.get("stderr") is not None and before[same].get("stderr") is not None:
            error, how = math.hypot(row["stderr"], before[same]["stderr"]), "independent"
        found.append({"model": row["model"], "metric": row["metric"], "setting": row["setting"], "before": before[same]["value"],
                      "after": row["value"], "difference": gap, "stderr": error, "how": how, "better": _better(row["metric"], gap, error)})  # fmt: skip
    if not found:
        raise UserError(
            f"{first} and {second} share no model, metric and setting, so there is nothing to compare. Run both with the same tasks."
        )
    return found


def render(rows: list[dict[str, Any]], console: Console) -> None:
    """The comparison as a table; a star marks what is more than two standard errors."""
    table = Table(caption="± is the standard error of the change; better or worse: by more than two of them")
    for column in ("metric", "setting", "model", "before", "after", "change", ""):
        table.add_column(column, justify="left" if column in ("metric", "setting", "model", "") else "right")
    for row in rows:
        metric = METRICS.get(row["metric"])
        text = metric.text if metric else "{:.4g}".format
        change = f"{row['difference']:+.4g}" + (f" ± {row['stderr']:.2g} ({row['how']})" if row["stderr"] is not None else "")
        verdict = {True: "better", False: "worse", None: ""}[row["better"]]
        title = metric.title if metric else row["metric"]
        table.add_row(title, row["setting"], row["model"], text(row["before"]), text(row["after"]), change, verdict)
    console.print(table)


def _better(metric: str, gap: float, error: float | None) -> bool | None:
    direction = METRICS[metric].better if metric in METRICS else "none"
    if error is None or abs(gap) <= 2 * error or direction == "none":
        return None
    return (gap > 0) == (direction == "higher")


def _results(place: str | Path) -> tuple[Rows, dict[str, Any]]:
    path = Path(place)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{place} holds no {RESULTS}. Give what `subquad eval ... --out FOLDER` or `subquad run` wrote.")
    how = f"Give {RESULTS}, or its folder; if it is that, run that eval again."
    return read_json(path, as_rows, how), read_json(path.with_name(ITEMS), mapping, how) or {}
