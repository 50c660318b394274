"""Scores of the same items by several models -> rows with standard errors, paired differences and recovery.

Two models that answer the same items share what makes an item hard, so the difference of their means is much better known than either mean:
its standard error is that of the differences per item.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from subquad.evals.answers import Answers
from subquad.evals.rows import METRICS, Row, row

SURE = 2.0  # standard errors above chance at which a task counts as solvable by the reference


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, with n - 1; None for a single item."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """(mean of value - reference over the same items, its standard error)."""
    assert len(values) == len(reference), "paired differences need the same items"
    gaps = [value - other for value, other in zip(values, reference, strict=True)]
    return mean(gaps), stderr(gaps)


def recovery(value: float, reference: float, chance: float = 0.0) -> float | None:
    """(value - chance) / (reference - chance); None where the reference is not above chance."""
    return (value - chance) / (reference - chance) if reference > chance else None


def solvable(reference: Sequence[float], chance: float) -> bool:
    """Whether the reference is above chance by SURE standard errors: if not, the task says nothing about anybody else."""
    if not reference:
        return False
    error = stderr(reference) or math.sqrt(max(chance * (1 - chance), 0.25 / len(reference)) / len(reference))
    return mean(reference) > chance + SURE * error


def paired_rows(
    metric: str, setting: str, scores: Mapping[str, Sequence[float]], answers: Answers, *, chance: float = 0.0, **more: Any
) -> list[Row]:
    """One row per model from its score for every item; the first model is the reference. The scores go to answers.items."""
    names = list(scores)
    first = list(scores[names[0]]) if names else []
    rows = []
    for name in names:
        values = list(scores[name])
        answers.note(metric, setting, name, values)
        extra: dict[str, Any] = {"n": len(values), "stderr": stderr(values), "chance": chance, **more}
        if METRICS[metric].better == "higher":
            extra["solvable"] = solvable(first, chance)
        if name != names[0]:
            extra["difference"], extra["difference_stderr"] = difference(values, first)
            if METRICS[metric].better == "higher":
                extra["recovery"] = recovery(mean(values), mean(first))
                extra["recovery_above_chance"] = recovery(mean(values), mean(first), chance) if extra["solvable"] else None
        rows.append(row(name, metric, setting, mean(values), **extra))
    return rows
