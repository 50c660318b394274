"""One recipe from start to end: the page that explains the toolkit.

    plan -> select the heads that stay exact -> linearize -> stages -> save the student -> evals -> sample

Each step is a function below; on their own, from Python: `subquad.linearize`, `subquad.distill`, `subquad.evaluate` (verbs.py).
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from subquad.distill.data import Tokens
from subquad.distill.log import JsonLog
from subquad.errors import raise_all
from subquad.evals import table
from subquad.folder import MAIN, RunFolder, as_rows, as_scores, check_apart, mapping
from subquad.healing import heal, stage_problems
from subquad.inputs import Teacher, Text, prompt_ids, read_documents
from subquad.leakage import guard
from subquad.linearize import Plan, hub, linearize
from subquad.progress import Reporter
from subquad.recipe import Recipe, load_recipe, rewritten
from subquad.selection import choose_heads, train_gates
from subquad.smoke import no_budget, shrink_recipe
from subquad.talk import answer
from subquad.verbs import Rows, check_tasks, evaluate, versions


def run(recipe: Recipe | str, out: str | Path, *, overwrite: bool = False, smoke: bool = False, report: Reporter | None = None) -> Rows:
    """Everything a recipe says, into the run folder `out`; returns the rows of the final table.

    Killed at any moment and called again, it continues and ends with the same numbers. Raises UserError before anything is
    written or deleted for what can be known without computing.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    report = report or Reporter()
    if smoke:
        if why := no_budget(recipe):
            report.line(why)
        recipe = shrink_recipe(recipe)
    folder = RunFolder(out, recipe.dump(), overwrite, rewritten)
    folder.check()
    check_apart(folder.path, recipe.teacher)
    teacher = Teacher(recipe, smoke)
    rough = choose_heads(recipe, teacher.config, scores=None)  # refuse now what could not be planned later
    train, held_out = read_documents(recipe.data, smoke)
    overlap = guard(train, held_out, recipe.evals.root, recipe.data.allow_overlap)
    for entry in overlap:
        report.line(f"Overlap with the training text: {entry['share']:.2%} of the runs of 13 words in {entry['set']}")
    text = Text(Tokens.from_documents(train, teacher.tokenizer), Tokens.from_documents(held_out, teacher.tokenizer), tuple(overlap))
    check_tasks(recipe.evals.root, text.held_out, teacher.tokenizer)
    if recipe.sample is not None:
        prompt_ids(teacher.tokenizer, recipe.sample.prompt)
    if overwrite or not (folder / "student").is_dir():
        check_training(recipe, rough, teacher, text.train)

    with folder:
        log = JsonLog(folder / "log.jsonl")
        what = make_plan(recipe, teacher, text.train, folder, log, report)
        what.render(report.console)
        student = make_student(recipe, teacher, what, text, folder, log, report)
        rows = judge(recipe, teacher, student, text.held_out, folder, report)
        table.render(rows, report.console)
        show_sample(recipe, student, teacher.tokenizer, report)
        report.line(f"\nThe student is in {folder / 'student'}. Talk to it: subquad chat {folder / 'student'}")
    return rows


# ---- the steps ---------------------------------------------------------------------------------------------------------------------


def check_training(recipe: Recipe, what: Plan, teacher: Teacher, tokens: Tokens) -> None:
    """Open the teacher, which may be damaged, and refuse what selection and stages could not train."""
    short = tokens.shortage(recipe.select.context) if recipe.select and recipe.select.method == "gates" else []
    problems = [*short, *stage_problems(recipe.stages, tokens, what.parameters_added() > 0, teacher.open().dtype)]
    raise_all(list(dict.fromkeys(problems)))


def make_plan(recipe: Recipe, teacher: Teacher, tokens: Tokens, folder: RunFolder, log: JsonLog, report: Reporter) -> Plan:
    """What becomes what. Scores that a selection needs are learned once and kept in selection.json."""
    if (known := folder.read("plan.json", lambda known: Plan.from_dict(mapping(known)))) is not None:
        return known
    scores = None
    if recipe.select and recipe.select.method == "gates":
        report.heading("Select: one gate per key/value head")
        scores = folder.read("selection.json", as_scores)
        if scores is None:
            scores = train_gates(teacher.fresh(), recipe, tokens, folder=folder / "checkpoints" / "select", log=log, report=report)
            folder.write("selection.json", scores)
    what = choose_heads(recipe, teacher.config, scores)
    folder.write("plan.json", what.to_dict())
    return what


def make_student(
    recipe: Recipe, teacher: Teacher, what: Plan, text: Text, folder: RunFolder, log: JsonLog, report: Reporter
) -> PreTrainedModel:
    """Convert, heal, save; or open what an earlier call of the same run saved."""
    if (folder / "student").is_dir():
        return hub.load(folder / "student", dtype=recipe.dtype)
    report.heading("Linearize" + (" and heal" if recipe.stages else ""))
    torch.manual_seed(recipe.seed)  # of the mixers' fresh parameters
    student = linearize(teacher.fresh(), what)
    trained = heal(
        student,
        recipe.stages,
        text.train,
        open_teacher=teacher.fresh,
        folder=folder / "checkpoints",
        log=log,
        seed=recipe.seed,
        report=report,
    )
    if MAIN:
        hub.save(student, folder / "student", tokenizer=teacher.tokenizer, provenance=provenance(recipe, text, trained))
    return student


def judge(recipe: Recipe, teacher: Teacher, student: PreTrainedModel, tokens: Tokens, folder: RunFolder, report: Reporter) -> Rows:
    """The recipe's evals: teacher, sinks + window untrained, student. Kept in results.json."""
    rows = folder.read("results.json", as_rows)
    if rows is None or (recipe.evals.root and not rows):
        report.heading("Evaluate on held-out text")
        rows = evaluate(student, tokens, recipe.evals.root, teacher=teacher.fresh(), tokenizer=teacher.tokenizer, report=report)
        folder.write("results.json", rows)
    return rows


def show_sample(recipe: Recipe, student: PreTrainedModel, tokenizer: Any, report: Reporter) -> None:
    """What the student says to the recipe's prompt."""
    if recipe.sample is not None:
        report.heading("Sample")
        report.line(recipe.sample.prompt)
        report.line("> " + answer(student, tokenizer, recipe.sample.prompt, recipe.sample.new_tokens))


def provenance(recipe: Recipe, text: Text, trained: int) -> dict[str, Any]:
    """What the student's config.json and card say about where it comes from."""
    return {
        "teacher": recipe.teacher,
        "revision": recipe.revision,
        "recipe": recipe.to_dict(),
        "data_sha256": {"train": text.train.sha256, "eval": text.held_out.sha256},
        "overlap": list(text.overlap),
        "trained_tokens": trained,
        "versions": versions(),
    }
