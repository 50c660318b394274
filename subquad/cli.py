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

from subquad.errors import UserError

app = typer.Typer(
    name="subquad",
    help="Turn pretrained softmax-attention models into sub-quadratic ones: convert, distill, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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


@command(app, "eval")
def evaluate(
    folder: Folder,
    data: Data = None,
    teacher: TeacherName = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Measure a student beside its teacher and the same window untrained. --set perplexity.context=2048 chooses tasks and settings."""
    from subquad import verbs
    from subquad.evals import table

    report = reporter(json)
    rows = verbs.evaluate_folder(folder, data or ["pydoc"], teacher, sets or [], report)
    show(rows) if json else table.render(rows, report.console)


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
