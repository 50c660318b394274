"""What a run folder holds, read into one value. Every part but the plan may be missing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subquad.distill.log import JsonLog
from subquad.errors import UserError
from subquad.evals.rows import METRICS
from subquad.folder import as_rows, as_scores, mapping, read_json
from subquad.linearize.plan import Plan
from subquad.settings import read_yaml

AGAIN = "Save or download the student again."


@dataclass
class Facts:
    """rows: of the run's own evals and of the evals folder, later ones winning where model, metric and setting are equal."""

    run: Path
    plan: Plan
    recipe: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # stage -> rows of log.jsonl
    scores: dict[int, list[float]] | None = None  # of the selection, by layer and head
    diagnosis: dict[str, Any] | None = None
    about: dict[str, Any] | None = None  # of the evals folder
    provenance: dict[str, Any] = field(default_factory=dict)
    student: Path | None = None

    @property
    def models(self) -> list[str]:
        order = ("teacher", "window", "student")
        found = dict.fromkeys(row["model"] for row in self.rows)
        return [name for name in order if name in found] + [name for name in found if name not in order]

    @property
    def overall(self) -> list[dict[str, Any]]:
        """Rows of the one table of results: all but those that are many for one task."""
        return [row for row in self.rows if not METRICS[row["metric"]].drawn]

    def of(self, *metrics: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["metric"] in metrics]


def collect(run: Path, evals: Path | None = None) -> Facts:
    """Read `run` (and `evals`, or RUN/evals where it is). UserError for a folder that holds no run, and for damaged files."""
    if not (run / "plan.json").is_file():
        hint = f" Did you mean {run.parent}?" if (run.parent / "plan.json").is_file() else ""
        raise UserError(f"{run} holds no run (no plan.json).{hint} Give the folder that `subquad run RECIPE --out FOLDER` wrote.")
    evals = evals if evals is not None else run / "evals"
    if not evals.is_dir() and evals != run / "evals":
        raise UserError(f"No such folder: {evals}. Give what `subquad eval ... --out FOLDER` wrote.")
    student = run / "student" if (run / "student" / "config.json").is_file() else None
    measured = [row for place in (run, evals) for row in read_json(place / "results.json", _known) or []]
    rows = {(row["model"], row["metric"], row["setting"]): row for row in measured}
    return Facts(
        run=run,
        plan=read_json(run / "plan.json", lambda known: Plan.from_dict(mapping(known))),
        recipe=read_yaml(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else {},
        rows=list(rows.values()),
        log=_log(run / "log.jsonl"),
        scores=read_json(run / "selection.json", as_scores),
        diagnosis=read_json(evals / "diagnosis.json", _diagnosed) or read_json(run / "diagnosis.json", _diagnosed),
        about=read_json(evals / "about.json", mapping),
        provenance=read_json(student / "config.json", mapping, AGAIN).get("provenance", {}) if student is not None else {},
        student=student,
    )


def _known(value: Any) -> list[dict[str, Any]]:
    """Rows whose metrics have a title and a unit."""
    found = as_rows(value)
    if unknown := {row["metric"] for row in found} - set(METRICS):
        raise ValueError(f"unknown metrics: {', '.join(sorted(unknown))}")
    return found


def _diagnosed(value: Any) -> dict[str, Any]:
    return {**mapping(value), "rows": _known(value["rows"]), "findings": [*value["findings"]]}


def _log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage, in order; a last line that is cut short is left out."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in JsonLog(path).rows():
        if "loss" in row and "stage" in row:
            stages.setdefault(row["stage"], []).append(row)
    return stages
