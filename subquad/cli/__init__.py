"""The command line: words to functions, no logic. A file per group of commands; importing it is what registers them, in the order of --help."""

from subquad.allocator import give_large_tensors_back
from subquad.cli import convert, look, measure, recipes  # noqa: F401
from subquad.cli.shared import app, parse_exact

__all__ = ["app", "main", "parse_exact"]


def main() -> None:
    """The console script."""
    give_large_tensors_back()
    app()
