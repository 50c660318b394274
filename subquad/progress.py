"""What a run says while it works: headings, and for long work a bar with numbers and the time left; plain lines when not on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from subquad.folder import MAIN

Tick = Callable[..., None]  # tick(done, loss=..., ...)
WIDTH = 140  # of tables in a file or a pipe; rich assumes 80 there and folds them
SECONDS_BETWEEN_LINES = 15.0  # a 10-minute stage is then 40 lines of a CI log


class Reporter:
    """Everything a run prints goes through one of these. `stderr=True` keeps standard output free for --json."""

    def __init__(self, console: Console | None = None, stderr: bool = False):
        self.console = console or Console(stderr=stderr, highlight=False, quiet=not MAIN)
        if console is None and not self.console.is_terminal:
            self.console.width = WIDTH

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, name: str, total: int, unit: str = "step") -> Iterator[Tick]:
        """Yields tick(done, **numbers). `done` may start above 0 (a continued run): the time left is reckoned from what was done here."""
        with _bar(self.console, name, total) if self.console.is_terminal else _lines(self, name, total, unit) as tick:
            yield tick


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Tick]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=total, numbers="")
        yield lambda done, **numbers: progress.update(task, completed=done, numbers=_numbers(numbers))


@contextmanager
def _lines(reporter: Reporter, name: str, total: int, unit: str) -> Iterator[Tick]:
    started = spoke = time.monotonic()
    first: int | None = None

    def tick(done: int, **numbers: float) -> None:
        nonlocal spoke, first
        now = time.monotonic()
        first = done - 1 if first is None else first
        if now - spoke < SECONDS_BETWEEN_LINES and done < total and done > first + 1:
            return
        spoke = now
        left = (now - started) / max(done - first, 1) * (total - done)
        reporter.line(f"{name} {unit} {done}/{total}  {_numbers(numbers)}  elapsed {_clock(now - started)}  left {_clock(left)}")

    yield tick


def _numbers(numbers: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
