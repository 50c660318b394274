"""The plan for a reader: what becomes what, and what it saves."""

from typing import Any

from rich.console import Console
from rich.table import Table

from subquad.linearize.plan import LayerPlan, Plan

CONTEXTS = (4096, 32768, 131072)  # tokens


def render(plan: Plan, console: Console) -> None:
    """Print the plan: layers (alike ones together), bytes per sequence, parameters."""
    layers = Table(title=f"{plan.model_type}: {plan.mixer}, window {plan.window}, {plan.sinks} sinks", title_justify="left")
    for name in ("layers", "KV heads", "become", "exact heads", "because"):
        layers.add_column(name)
    for first, last, row in _groups(plan.layers):
        where = str(first) if first == last else f"{first}-{last}"
        layers.add_row(where, str(row.kv_heads), row.mixer or "stay as they are", ", ".join(map(str, row.exact)) or "-", row.why)
    console.print(layers)
    table = Table(title="KV and state bytes per sequence", title_justify="left")
    for name in ("context", "teacher", "student", "kept"):
        table.add_column(name, justify="right")
    for row in plan.summary()["bytes"]:
        table.add_row(f"{row['context']:,}", megabytes(row["teacher"]), megabytes(row["student"]), f"{row['share']:.1%}")
    console.print(table)
    heads = sum(layer.kv_heads for layer in plan.layers)
    soft = sum(layer.soft_heads for layer in plan.layers)
    console.print(f"{soft} of {heads} KV heads converted, {heads - soft} exact; {plan.parameters_added():,} parameters added")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def summary(plan: Plan) -> dict[str, Any]:
    """JSON values: the bytes at CONTEXTS, the parameters, a row per layer."""
    sizes = [(n, plan.teacher_bytes(n), plan.student_bytes(n)) for n in CONTEXTS]
    return {
        "model_type": plan.model_type,
        "mixer": plan.mixer,
        "window": plan.window,
        "sinks": plan.sinks,
        "parameters_added": plan.parameters_added(),
        "bytes": [{"context": n, "teacher": t, "student": s, "share": round(s / t, 6)} for n, t, s in sizes],
        "layers": plan.to_dict()["layers"],
    }


def _groups(rows: tuple[LayerPlan, ...]) -> list[tuple[int, int, LayerPlan]]:
    """Consecutive layers that read alike: (first index, last index, one of them)."""
    groups: list[tuple[int, int, LayerPlan]] = []
    for row in rows:
        if groups and groups[-1][1] == row.index - 1 and _face(groups[-1][2]) == _face(row):
            groups[-1] = (groups[-1][0], row.index, row)
        else:
            groups.append((row.index, row.index, row))
    return groups


def _face(row: LayerPlan) -> tuple:
    return row.kv_heads, row.mixer, row.exact, row.why
