"""A run as one HTML page and a model card. Reads a run folder, measures nothing.

collect.py reads, pictures.py draws, page.py puts both into page.html.j2, card.py writes the card's numbers.
"""

from pathlib import Path

from subquad.errors import UserError
from subquad.folder import check_folder, write_text
from subquad.report.card import write_card
from subquad.report.collect import collect
from subquad.report.page import render

__all__ = ["write"]


def write(run: Path, out: Path | None = None, evals: Path | None = None) -> dict[str, Path]:
    """Write RUN/report.html (or `out`) and, where the run has a student, student/README.md; returns what was written.

    UserError when `run` is no run folder or matplotlib is missing.
    """
    out = Path(out) if out is not None else Path(run) / "report.html"
    check_folder(out.parent)
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out needs a file, for example {out / 'report.html'}.")
    facts = collect(Path(run), evals)
    html = render(facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    written = {"report": out}
    if facts.student is not None:
        write_card(facts)
        written["card"] = facts.student / "README.md"
    return written
