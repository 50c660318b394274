"""The command line: words to functions, no logic. One boundary turns a user's mistake into its sentences and exit code 2."""

import errno
import functools
import json as json_text
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from subquad.errors import UserError

app = typer.Typer(
    name="subquad",
    help="Turn pretrained softmax-attention models into sub-quadratic ones: convert, distill, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STUDENT = "model"  # the command that `subquad eval DIR` means


class Fallback(typer.core.TyperGroup):
    """A group whose first word may also be no command: then all words belong to STUDENT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [STUDENT, *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=Fallback,
    help="Measure. `subquad eval DIR` measures a student beside its teacher (options: subquad eval model --help).",
    no_args_is_help=True,
)
app.add_typer(eval_app, name="eval")
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="A hub id, a model folder, a GGUF file, or the alias smollm2-135m.")]
Folder = Annotated[Path, typer.Argument(help="A student folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to standard output; everything else goes to standard error.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a value by its path: --set stages.0.lr=1e-4. Repeatable.")
]
Out = Annotated[Path, typer.Option("--out", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier, different call left in --out.")]
Mixer = Annotated[str, typer.Option("--mixer", help="What converted heads compute.")]
Window = Annotated[int, typer.Option("--window", min=1, help="Tokens each query sees exactly.")]
Sinks = Annotated[int, typer.Option("--sinks", min=0, help="First tokens that always stay visible.")]
Exact = Annotated[str | None, typer.Option("--exact", help="What stays softmax: layers '0,15', or layer:head pairs '0:1,0:2,15:0'.")]
Data = Annotated[list[str] | None, typer.Option("--data", help="Text: a file, a folder, pydoc, or a datasets name. Repeatable.")]

TeacherName = Annotated[
    str | None, typer.Option("--teacher", help="The model to compare with; by default the one the student was made from.")
]

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def boundary() -> Iterator[None]:
    """The only place where an exception becomes a message. Bugs of ours pass through with their traceback."""
    try:
        yield
    except UserError as error:
        stop(error.problems)
    except KeyboardInterrupt as error:  # distill's Interrupted is one and carries what was saved
        stop([str(error) or "Stopped."] + ([f"To go on: {again()}"] if str(error) else []), code=130)
    except OSError as error:
        if error.errno in FULL_DISK:
            stop([f"Cannot write {error.filename or 'the output'}: {error.strerror}. Free some space, then: {again()}"])
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | FileNotFoundError):
            stop([f"{error.strerror}: {error.filename}."])
        raise


def stop(problems: list[str] | tuple[str, ...], code: int = 2) -> None:
    for problem in problems:
        print(problem, file=sys.stderr)
    raise typer.Exit(code)


def again() -> str:
    """The command that goes on: the one given, without what would delete the work so far."""
    return shlex.join(["subquad", *(word for word in sys.argv[1:] if word != "--overwrite")])


def command(on: typer.Typer, name: str | None = None) -> Callable:
    """A typer command that runs inside the boundary."""

    def register(function: Callable) -> Callable:
        @on.command(name)
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            quiet()
            with boundary():
                function(*args, **kwargs)

        return function

    return register


@functools.cache
def quiet() -> None:
    """Libraries keep their warnings, not their bars for every loaded tensor; in a file or a pipe, no bars of theirs at all."""
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def show(value: Any) -> None:
    print(json_text.dumps(value, indent=1, ensure_ascii=False))


def reporter(json: bool):
    from subquad.progress import Reporter

    return Reporter(stderr=json)


# ---- commands ------------------------------------------------------------------------------------------------------------------------


@command(app)
def plan(
    model: Model, mixer: Mixer = "window", window: Window = 64, sinks: Sinks = 4, exact: Exact = None, sets: Sets = None, json: Json = False
) -> None:
    """What would become what, and what it saves. Reads the config only. --set layers=[0,1] and --set options.KEY=VALUE give the rest."""
    result = make_plan(model, mixer, window, sinks, exact, sets)
    show(result.to_dict() | {"summary": result.summary()}) if json else result.render(reporter(json).console)


@command(app)
def linearize(
    model: Model,
    out: Out,
    mixer: Mixer = "window",
    window: Window = 64,
    sinks: Sinks = 4,
    exact: Exact = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Convert a model without training and save it as a student folder."""
    from subquad import verbs

    result = make_plan(model, mixer, window, sinks, exact, sets)
    report = reporter(json)
    result.render(report.console)
    verbs.convert_folder(model, result, out, overwrite=overwrite)
    show({"student": str(out), "plan": result.to_dict()}) if json else report.line(f"The student is in {out}.")


@command(app)
def distill(
    folder: Folder,
    out: Out,
    data: Data = None,
    teacher: TeacherName = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Heal a converted folder: one KL stage on the attention weights; change it with --set tokens=200k, lr=1e-4, train=lora, ..."""
    from subquad import verbs

    verbs.distill_folder(folder, data or ["pydoc"], out, sets or [], teacher=teacher, overwrite=overwrite, report=reporter(json))
    if json:
        show({"student": str(out / "student")})


@command(app, "run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; runs/<recipe> if not given.")] = None,
    sets: Sets = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="The whole recipe on two layers of the model and a few tokens.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """One recipe from start to end. Stop it at any time; the same command continues it."""
    from subquad import run
    from subquad.recipe import load_recipe

    loaded = load_recipe(recipe, sets)
    out = out or Path("runs") / (loaded.name + ("-smoke" if smoke else ""))
    rows = run.run(loaded, out, overwrite=overwrite, smoke=smoke, report=reporter(json))
    if json:
        show({"student": str(out / "student"), "rows": rows})


@command(eval_app, STUDENT)
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help="A student folder; with --tasks or --suite any model.")],
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
    from subquad import judging, verbs
    from subquad.evals import table

    report = reporter(json)
    if tasks is None and suite is None and out is None and models is None and limit is None:
        rows = verbs.evaluate_folder(Path(folder), data or ["pydoc"], teacher, sets or [], report)
    else:
        if tasks is None and suite is None:
            raise UserError("--out, --models and --limit go with --tasks or --suite: say what to measure.")
        chosen = judging.chosen_tasks(tasks, suite, sets or [], benchmarks, limit)
        who = [name.strip() for name in models.split(",")] if models else None
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


@command(app)
def chat(
    folder: Annotated[str, typer.Argument(help="A student folder, or any teacher.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and leave.")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Longest answer.")] = 256,
    json: Json = False,
) -> None:
    """Talk to a model; an empty line or the end of input leaves."""
    from subquad.talk import talk

    answers = talk(folder, prompt, new_tokens, quiet=json)
    if json:
        show(answers)


@command(app)
def mixers(
    name: Annotated[str | None, typer.Argument(help="One mixer, in full.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model to say the state's bytes for.")] = None,
    window: Window = 64,
    sinks: Sinks = 4,
    json: Json = False,
) -> None:
    """The mixers a recipe can name: where they come from, what they compute, what they remember."""
    from subquad.linearize.mixers import describe

    if name is None:
        rows = describe.rows()
        return show(rows) if json else print(*(f"{r['name']:18} {' '.join(r['seeds']):14} {r['about']}" for r in rows), sep="\n")
    found = describe.describe(name)
    planned = None if model is None else make_plan(model, name, window, sinks, None, None)
    if json:
        return show(found if planned is None else found | {"model": planned.summary()})
    print(
        f"{found['name']} - {found['about']}",
        f"paper      {found['paper']} (table row {', '.join(found['seeds'])})",
        *found["formula"],
        sep="\n",
    )
    print(
        f"direction  {', '.join(found['directions'])}", f"needs      {found['needs']}", f"is exact   {found['exact'] or 'never'}", sep="\n"
    )
    if planned is not None:
        planned.render(reporter(json).console)


@command(app)
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compare every kernel with its definition on this machine, and time it.")
    ] = False,
    json: Json = False,
) -> None:
    """What is installed and what it means here. With --kernels: are the numbers right on this device? Exits with 1 if not."""
    from subquad import doctor as checks

    found = checks.environment()
    if not json:
        for text in checks.render(found):
            print(text)
    rows = []
    for row in checks.kernels() if kernels else ():
        rows.append(row)
        if not json:
            print(checks.line(row), flush=True)
    if kernels and not json and checks.unchecked():
        print(checks.unchecked())
    if json:
        show(found | {"findings": checks.findings(found), "kernels": rows})
    if not all(row["ok"] for row in rows):
        stop(["Some kernels do not compute what they should here. Please report the lines above with your GPU's name."], code=1)


@command(recipes_app, "ls")
def recipes_ls(json: Json = False) -> None:
    """Names and one line each."""
    from subquad.recipe import load_recipe, shipped

    rows = [{"name": name, "about": load_recipe(name).about} for name in shipped()]
    if json:
        return show(rows)
    for row in rows:
        print(f"{row['name']:32} {row['about']}")


@command(recipes_app, "show")
def recipes_show(recipe: str, sets: Sets = None, json: Json = False) -> None:
    """The resolved recipe: parents merged, variables and defaults filled in."""
    from subquad.recipe import load_recipe

    loaded = load_recipe(recipe, sets)
    show(loaded.to_dict()) if json else print(loaded.dump(), end="")


@command(recipes_app, "copy")
def recipes_copy(recipe: str, to: Annotated[Path, typer.Argument(help="The YAML file to write.")]) -> None:
    """A resolved copy to change and run."""
    from subquad.folder import write_text
    from subquad.recipe import load_recipe

    if to.exists():
        raise UserError(f"{to} exists already; choose another name.")
    write_text(to, load_recipe(recipe).dump())
    print(f"Run it with: subquad run {to}")


@command(recipes_app, "schema")
def recipes_schema() -> None:
    """JSON schema of a recipe, for editors."""
    from subquad.recipe import Recipe

    show(Recipe.model_json_schema())


def make_plan(model: str, mixer: str, window: int, sinks: int, exact: str | None, sets: list[str] | None) -> Any:
    from subquad.linearize import plan as plan_of
    from subquad.linearize.teacher import load_config
    from subquad.recipe import PlanSection
    from subquad.settings import apply_sets, validate

    given = {"mixer": mixer, "window": window, "sinks": sinks, "exact": parse_exact(exact)}
    section = validate(PlanSection, apply_sets(given, sets or []))
    return plan_of(load_config(model), **section.model_dump())


def parse_exact(text: str | None) -> list[int] | dict[int, list[int]] | None:
    """'0,15' -> [0, 15]; '0:1,0:2,3:0' -> {0: [1, 2], 3: [0]}. Raises UserError for anything else."""
    if text is None:
        return None
    try:
        pairs = [tuple(int(part) for part in item.split(":")) for item in text.split(",") if item.strip()]
        if all(len(pair) == 1 for pair in pairs):
            return [layer for (layer,) in pairs]
        heads: dict[int, list[int]] = {}
        for layer, head in pairs:
            heads.setdefault(layer, []).append(head)
        return heads
    except ValueError:
        raise UserError(f"--exact {text!r}: expected layers such as 0,15 or layer:head pairs such as 0:1,0:2,15:0.") from None


def main() -> None:
    """The console script."""
    app()
