"""Commands that show and talk: chat, mixers, doctor."""

from typing import Annotated

import typer

from subquad.cli.shared import Json, Sinks, Window, app, command, make_plan, reporter, show, stop
from subquad.errors import UserError

WINDOW, SINKS = 64, 4


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
    window: Window = WINDOW,
    sinks: Sinks = SINKS,
    json: Json = False,
) -> None:
    """The mixers a recipe can name: where they come from, what they compute, what they remember."""
    from subquad.linearize.mixers import describe

    if model is not None and name is None:
        raise UserError(f"--model: say which mixer, for example subquad mixers gla --model {model}.")
    if model is None and (window, sinks) != (WINDOW, SINKS):
        raise UserError("--window and --sinks size the state in a model: give --model too, or leave them out.")
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
