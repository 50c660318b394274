"""What every task returns, and how the numbers of each metric are written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict


class Row(TypedDict):
    """One number. setting: what it was measured on, in words, equal for all models. value: None when it is not a finite number.

    ratio: value / value of the reference model at the same metric and setting; None where that does not exist or is 0.
    """

    model: str
    metric: str
    setting: str
    value: float | None
    ratio: float | None


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. better: 'lower' or 'higher'."""

    title: str
    better: str
    text: Callable[[float], str]


def _bytes(value: float) -> str:
    """Decimal units, as disks and `plan` count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _number(value: float) -> str:
    """Four digits, without an exponent where people read numbers."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value else "0"


METRICS = {
    "perplexity": Metric("perplexity", "lower", _number),
    "perplexity_by_position": Metric("perplexity by position", "lower", _number),
    "repeat_perplexity": Metric("repeat (perplexity)", "lower", _number),
    "kl_to_teacher": Metric("KL to teacher (nats/token)", "lower", _number),
    "top1_agreement": Metric("top-1 agreement", "higher", lambda value: f"{100 * value:.1f} %"),
    "decode_tokens_per_second": Metric("decode (tokens/s)", "higher", _number),
    "state_bytes": Metric("state (bytes)", "lower", _bytes),
}


def row(model: str, metric: str, setting: str, value: float) -> Row:
    """A row without its ratio, which `arrange` fills in. A number JSON cannot hold (a diverged model's) becomes None."""
    assert metric in METRICS, f"{metric} is missing in METRICS"
    return Row(model=model, metric=metric, setting=setting, value=value if math.isfinite(value) else None, ratio=None)


def shown(row: Row) -> str:
    """The value as text."""
    return "not finite" if row["value"] is None else METRICS[row["metric"]].text(row["value"])


def arrange(rows: list[Row], models: list[str]) -> list[Row]:
    """Rows grouped by metric and setting in order of first appearance, models in the given order, ratios to the first of several models."""
    groups = list(dict.fromkeys((row["metric"], row["setting"]) for row in rows))
    ordered = sorted(rows, key=lambda row: (groups.index((row["metric"], row["setting"])), models.index(row["model"])))
    reference = {(row["metric"], row["setting"]): row["value"] for row in rows if len(models) > 1 and row["model"] == models[0]}
    return [{**row, "ratio": _ratio(row["value"], reference.get((row["metric"], row["setting"])))} for row in ordered]


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
