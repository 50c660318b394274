"""The command line: words to functions, no logic. A file per group of commands; importing it is what registers them, in the order of --help."""

from subquad.cli import convert, measure, look, recipes  # noqa: F401, I001
from subquad.cli.shared import app, parse_exact

__all__ = ["app", "main", "parse_exact"]


def main() -> None:
    """The console script."""
    app()
