"""`subquad eval ...` and `subquad report`."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.shared import STUDENT, Data, Folder, Json, Sets, TeacherName, app, command, eval_app, reporter, show
from subquad.errors import UserError


@command(eval_app, STUDENT)
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help="A student folder; with tasks said, any model.")],
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Names with commas: rows of `subquad eval tasks`, files, lm-evaluation-harness tasks."),
    ] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="A ready choice of tasks: standard, quick, recall.")] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option("--benchmarks", envvar="SUBQUAD_BENCHMARKS", help="The folder in which --tasks and --suite look for files."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Items of each file or task, from its start.")] = None,
    models: Annotated[str | None, typer.Option("--models", help="Which of teacher,window,student to measure.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Keep answers and results here: a stopped eval goes on, and can be compared with another.")
    ] = None,
    data: Data = None,
    teacher: TeacherName = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Measure a student beside its teacher and the same window untrained. --set perplexity.context=2048 chooses tasks and settings."""
    from subquad import judging
    from subquad.evals import table

    report = reporter(json)
    chosen = judging.chosen_tasks(tasks, suite, sets or [], benchmarks, limit)
    who = [name.strip() for name in models.split(",")] if models is not None else None
    if teacher is not None and who == ["student"]:
        raise UserError("--teacher: with --models student no teacher is measured. Leave one of the two out.")
    rows = judging.judge_folder(folder, chosen, data or ["pydoc"], teacher=teacher, who=who, out=out, report=report)
    show(rows) if json else table.render(rows, report.console)


@command(eval_app, "tasks")
def eval_tasks(
    benchmarks: Annotated[
        str | None, typer.Option("--benchmarks", envvar="SUBQUAD_BENCHMARKS", help="A folder with evaluation files.")
    ] = None,
    json: Json = False,
) -> None:
    """Names for --tasks and --suite."""
    from subquad.evals import TASKS
    from subquad.evals.suites import SUITES, local_names

    names = {"tasks": list(TASKS), "files": local_names(benchmarks), "suites": list(SUITES)}
    if json:
        return show(names)
    for kind, found in names.items():
        print(f"{kind:7} {', '.join(found) or 'none; give --benchmarks FOLDER'}")


@command(eval_app, "diff")
def eval_diff(
    before: Annotated[Path, typer.Argument(help="A folder with results.json, or such a file.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    json: Json = False,
) -> None:
    """What changed between two results, with standard errors: paired where both kept the scores of the same items."""
    from subquad import judging

    rows = judging.compare(before, after)
    show(rows) if json else judging.render(rows, reporter(json).console)


@command(eval_app, "mixer")
def eval_mixer(
    names: Annotated[str, typer.Argument(metavar="NAMES", help="Mixers with commas; softmax is the model left as it is.")],
    task: Annotated[str, typer.Option("--task", help="mqar, copying, selective_copying or induction.")] = "mqar",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="task.pairs=8, train.steps=500, options.feature_map=... Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a two-layer model from scratch per mixer on a recall task and test it: compares mixers before any conversion."""
    from subquad import scratch
    from subquad.evals import table

    report = reporter(json)
    rows = scratch.train_mixers([name.strip() for name in names.split(",") if name.strip()], task, sets or [], report)
    show(rows) if json else table.render(rows, report.console)


@command(eval_app, "diagnose")
def eval_diagnose(
    folder: Folder,
    data: Data = None,
    teacher: TeacherName = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="context, windows, repeat, samples, layers. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write diagnosis.json into this folder.")] = None,
    json: Json = False,
) -> None:
    """What each part of a student is worth (branches off one at a time, layers restored), what each contributes, and checks that it works."""
    from subquad import diagnosis
    from subquad.evals import table

    report = reporter(json)
    result = diagnosis.diagnose_folder(folder, data or ["pydoc"], teacher, sets or [], out, report)
    if json:
        return show(result)
    table.render(result["rows"], report.console)
    for finding in result["findings"]:
        report.line(f"! {finding}")
    if not result["findings"]:
        report.line("Nothing found that looks broken.")


@command(app, "report")
def write_report(
    run: Annotated[Path, typer.Argument(help="A run folder, as `subquad run` writes it.")],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file; RUN/report.html if not given.")] = None,
    evals: Annotated[
        Path | None, typer.Option("--evals", help="A folder of `subquad eval --out`; RUN/evals if not given and there.")
    ] = None,
    json: Json = False,
) -> None:
    """One self-contained HTML page about a run (no network), and the student's model card with its numbers."""
    from subquad.report import write

    written = write(run, out, evals)
    if json:
        return show({name: str(path) for name, path in written.items()})
    for name, path in written.items():
        print(f"{name}: {path}")
