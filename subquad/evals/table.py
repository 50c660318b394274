"""Rows as a table for people (a line per metric and setting, a column per model) and as JSON for programs."""

import json

from rich.console import Console
from rich.table import Table

from subquad.evals.rows import METRICS, Row, with_error


def render(rows: list[Row], console: Console) -> None:
    """Print the table; nothing for no rows."""
    if rows:
        console.print(build(rows))


def build(rows: list[Row]) -> Table:
    """Columns metric, setting, then one per model in order of appearance: value, and in brackets the ratio to the first model, or its share of
    what the first has above chance."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = list(dict.fromkeys((row["metric"], row["setting"]) for row in rows if not METRICS[row["metric"]].detail))
    cells = {(row["metric"], row["setting"], row["model"]): _cell(row, row["model"] == models[0]) for row in rows}
    table = Table(caption=_caption(rows, models))
    table.add_column("metric")
    table.add_column("setting")
    for model in models:
        table.add_column(model, justify="right", no_wrap=True)  # numbers stay whole, words wrap
    before = None
    for metric, setting in lines:
        title = METRICS[metric].title + {"lower": " ↓", "higher": " ↑", "none": ""}[METRICS[metric].better]
        table.add_row("" if metric == before else title, setting, *(cells.get((metric, setting, model), "") for model in models))
        before = metric
    return table


def _caption(rows: list[Row], models: list[str]) -> str:
    """What the signs mean that stand in this table."""
    said = {
        f"(×) ratio to {models[0]}": len(models) > 1,
        f"(%) share of what {models[0]} has above chance": any(row.get("recovery_above_chance") is not None for row in rows),
        f"not solved: {models[0]} is at chance": any(row.get("solvable") is False for row in rows),
        "± standard error": any(row.get("stderr") is not None for row in rows),
        "↓ lower is better, ↑ higher is better": True,
    }
    return "; ".join(text for text, holds in said.items() if holds)


def _cell(row: Row, is_reference: bool) -> str:
    if is_reference or row["ratio"] is None or row.get("solvable") is False:
        return with_error(row) + (" not solved" if row.get("solvable") is False and is_reference else "")
    above, error = row.get("recovery_above_chance"), row.get("ratio_stderr")
    if above is not None:
        return f"{with_error(row)} ({round(100 * above)} %)"
    return f"{with_error(row)} ({row['ratio']:.3f}×" + (f" ± {error:.3f})" if error is not None else ")")


def to_json(rows: list[Row]) -> str:
    """A JSON list of objects: model, metric, setting, value, ratio; null for what is not a finite number or has no ratio."""
    return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False)
