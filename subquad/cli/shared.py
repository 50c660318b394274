"""What all commands share: the groups, the words for options, and the boundary that turns a user's mistake into its sentences and exit code 2."""

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
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | FileNotFoundError | FileExistsError):
            stop([f"{error.strerror}: {error.filename}. Check that path, or give another."])
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
        if not pairs:
            raise ValueError
        if all(len(pair) == 1 for pair in pairs):
            return [layer for (layer,) in pairs]
        heads: dict[int, list[int]] = {}
        for layer, head in pairs:
            heads.setdefault(layer, []).append(head)
        return heads
    except ValueError:
        raise UserError(f"--exact {text!r}: expected layers such as 0,15 or layer:head pairs such as 0:1,0:2,15:0.") from None
