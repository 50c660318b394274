"""The model card with its numbers: what linearize/card.py wrote when the student was saved, plus results as a table and as model-index metadata."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard

from subquad.errors import UserError
from subquad.evals.rows import METRICS, shown
from subquad.folder import write_text
from subquad.report.collect import Facts

START, END = "<!-- results -->", "<!-- /results -->"


def write_card(facts: Facts) -> None:
    """Put the run's results into student/README.md: a section that replaces an earlier one, and a model-index of the student's values."""
    path = facts.student / "README.md"
    if not path.is_file():
        raise UserError(f"{path} is missing: save the student again.")
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    rows = [row for row in facts.overall if row["value"] is not None]
    own = [row for row in rows if row["model"] == "student"]
    if own:
        card.data.model_name = f"{str(facts.recipe.get('teacher', 'student')).rstrip('/').split('/')[-1]}-{facts.plan.mixer}"
        card.data.eval_results = [_result(row) for row in own]
    body, _, rest = card.text.partition(START)
    body += rest.partition(END)[2]
    card.text = f"{body.rstrip()}\n\n{START}\n{_table(facts.models, rows)}\n{END}\n" if rows else body
    write_text(path, str(card))


def _result(row: dict[str, Any]) -> EvalResult:
    task = row.get("task") or row["metric"]
    return EvalResult(
        task_type="text-generation", dataset_type=str(task).replace(" ", "_"), dataset_name=row["setting"], metric_type=row["metric"],
        metric_name=METRICS[row["metric"]].title, metric_value=row["value"],
    )  # fmt: skip


def _table(models: list[str], rows: list[dict[str, Any]]) -> str:
    cells = {(row["metric"], row["setting"], row["model"]): shown(row) for row in rows}
    lines = dict.fromkeys((row["metric"], row["setting"]) for row in rows)
    head = f"## Results\n\n| metric | setting | {' | '.join(models)} |\n|---|---|{'---|' * len(models)}"
    return "\n".join(
        [head, *(f"| {METRICS[m].title} | {s} | {' | '.join(cells.get((m, s, model), '') for model in models)} |" for m, s in lines)]
    )
