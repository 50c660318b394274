"""Commands that make students: plan, linearize, distill, run."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.shared import (
    Data,
    Exact,
    Folder,
    Json,
    Mixer,
    Model,
    Out,
    Overwrite,
    Sets,
    Sinks,
    TeacherName,
    Window,
    app,
    command,
    make_plan,
    reporter,
    show,
)


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
    verbs.convert_folder(model, result, out, overwrite=overwrite, report=report)
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
