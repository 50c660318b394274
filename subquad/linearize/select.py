"""From scores to a plan within a budget: which key/value heads (or layers) stay exact.

Key: G key/value heads of one layer.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from subquad.errors import UserError
from subquad.linearize.plan import Plan
from subquad.linearize.planner import plan, with_exact

Scores = Mapping[int, list[float]]  # layer -> one number per key/value head; larger: needs exact attention more


def choose(config, *, scores: Scores | None, granularity: str = "head", kv_bytes: float, at: int, **plan_arguments: Any) -> Plan:
    """The plan that keeps as many heads (or whole layers) exact as the budget allows, best scores first; without scores evenly spread.

    kv_bytes: share of the teacher's key/value bytes at `at` tokens that the student may keep. Raises UserError when even no exact head fits.
    """
    base = plan(config, **plan_arguments)
    check(base, kv_bytes=kv_bytes, at=at)
    kept: dict[int, list[int]] = {}
    best = base
    for layer, heads in _order(base, scores, granularity):
        trial = {**kept, layer: sorted({*kept.get(layer, []), *heads})}
        candidate = with_exact(base, trial)
        if not candidate.converted or share(candidate, at) > kv_bytes:
            break
        kept, best = trial, candidate
    return best


def share(plan: Plan, at: int) -> float:
    """Student's bytes over the teacher's at `at` tokens."""
    return plan.student_bytes(at) / plan.teacher_bytes(at)


def check(plan: Plan, *, kv_bytes: float, at: int) -> None:
    """Raise UserError when the plan costs more than `kv_bytes` of the teacher's bytes at `at` tokens."""
    found = share(plan, at)
    if found > kv_bytes:
        raise UserError(
            f"budget: kv_bytes {kv_bytes:g} at {at:,} tokens is {kv_bytes * plan.teacher_bytes(at):,.0f} bytes, but this plan needs "
            f"{plan.student_bytes(at):,} ({found:.4f}) before any further head is kept exact. Raise kv_bytes to at least {found:.4f}, "
            "make the window smaller, convert more layers, or ask at a longer context."
        )


def _order(base: Plan, scores: Scores | None, granularity: str) -> Iterator[tuple[int, list[int]]]:
    """(layer, heads) to keep exact, most wanted first. Ties go to the earlier layer."""
    rows = {row.index: row.kv_heads for row in base.converted}
    units = (
        [(i, [g]) for i, G in rows.items() for g in range(G)] if granularity == "head" else [(i, list(range(G))) for i, G in rows.items()]
    )
    if scores is None:
        yield from (units[k] for k in _spread(len(units)))
        return
    missing = [i for i in rows if len(scores.get(i, ())) != rows[i]]
    if missing:
        raise UserError(
            f"The saved scores do not fit this model: layers {missing} have other heads. Remove selection.json and score again."
        )
    yield from sorted(units, key=lambda unit: -sum(scores[unit[0]][g] for g in unit[1]) / len(unit[1]))


def _spread(n: int) -> list[int]:
    """0..n-1 such that every prefix is spread evenly: the middle first, then the middles of the halves, and so on."""
    order, gaps = [], [(0, n)]
    while gaps:
        following = []
        for low, high in gaps:
            if low < high:
                middle = (low + high) // 2
                order.append(middle)
                following += [(low, middle), (middle + 1, high)]
        gaps = following
    return order
