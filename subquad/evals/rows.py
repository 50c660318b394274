"""What every task returns, and how the numbers of each metric are written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict


class Core(TypedDict):
    """What every row has. setting: what it was measured on, in words, equal for all models. value: None when it is not a finite number.

    ratio: value / value of the reference model at the same metric and setting; None where that does not exist or is 0.
    """

    model: str
    metric: str
    setting: str
    value: float | None
    ratio: float | None


class Row(Core, total=False):
    """One number, with what only some tasks can say. stderr: standard error of value. n: items. chance: the value of a guess.

    ratio_stderr: of the ratio, paired over the same passages.
    difference, difference_stderr: value minus the reference's, paired over the same items. recovery: value / reference as a share (raw), and
    recovery_above_chance: (value - chance) / (reference - chance), None where the reference is not above chance by two standard errors, because
    then nothing can be recovered; solvable says which. task, length, depth: numbers of `setting` for programs. steps, state_bytes: of a model
    that was trained from scratch. limit: items taken out of `of` there are.
    """

    task: str
    n: int
    of: int
    stderr: float | None
    chance: float
    ratio_stderr: float | None
    difference: float
    difference_stderr: float | None
    recovery: float | None
    recovery_above_chance: float | None
    solvable: bool
    length: int
    depth: float
    steps: int
    state_bytes: int
    branch: str
    layer: int
    head: int


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. better: 'lower', 'higher', or 'none' where neither is."""

    title: str
    better: str
    text: Callable[[float], str]
    detail: bool = False  # left out of the table on the terminal; JSON and the report have it
    drawn: bool = False  # has a picture and a table of its own in the report


def _bytes(value: float) -> str:
    """Decimal units, as disks and `plan` count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _number(value: float) -> str:
    """Four digits, without an exponent where people read numbers."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value else "0"


METRICS = {
    "perplexity": Metric("perplexity", "lower", _number),
    "perplexity_by_position": Metric("perplexity by position", "lower", _number, drawn=True),
    "repeat_perplexity": Metric("repeat (perplexity)", "lower", _number),
    "kl_to_teacher": Metric("KL to teacher (nats/token)", "lower", _number),
    "top1_agreement": Metric("top-1 agreement", "higher", _percent),
    "accuracy": Metric("accuracy", "higher", _percent),
    "accuracy_norm": Metric("accuracy, length-normalised", "higher", _percent),
    "accuracy_by_depth": Metric("accuracy by depth", "higher", _percent, detail=True, drawn=True),
    "accuracy_by_paradigm": Metric("accuracy by paradigm", "higher", _percent, detail=True, drawn=True),
    "option_bias": Metric("option bias", "lower", _percent),
    "word_perplexity": Metric("perplexity per word", "lower", _number),
    "bits_per_byte": Metric("bits per byte", "lower", _number),
    "repetition": Metric("repeated 4-grams in own text", "none", _percent),
    "free_running_agreement": Metric("agreement on own text", "higher", _percent),
    "free_running_kl": Metric("KL to teacher on own text (nats/token)", "lower", _number),
    "same_text": Metric("tokens before leaving the teacher's text", "higher", _percent),
    "prefill_tokens_per_second": Metric("prefill (tokens/s)", "higher", _number),
    "first_token_seconds": Metric("time to first token", "lower", _seconds),
    "peak_bytes": Metric("peak memory of a prefill", "lower", _bytes),
    "crossover_tokens": Metric("faster than the teacher from (tokens)", "lower", _number),
    "branch_share": Metric("share of output norm", "none", _percent),
    "attention_kl": Metric("KL of attention maps (nats/query)", "lower", _number, detail=True),
    "attention_entropy": Metric("entropy of attention maps (nats)", "none", _number, detail=True),
    "monotonicity": Metric("weights follow logits (rank correlation)", "higher", _number, detail=True),
    "ablated_perplexity": Metric("perplexity without", "none", _number),
    "ablated_repeat": Metric("repeat without", "none", _number),
    "gate": Metric("share of the linear branch", "none", _percent),
    "lm_eval": Metric("lm-evaluation-harness", "higher", _number),
    "decode_tokens_per_second": Metric("decode (tokens/s)", "higher", _number),
    "state_bytes": Metric("state (bytes)", "lower", _bytes),
}


def row(model: str, metric: str, setting: str, value: float, **more: Any) -> Row:
    """A row without its ratio, which `arrange` fills in. A number JSON cannot hold (a diverged model's) becomes None. more: see Row."""
    assert metric in METRICS, f"{metric} is missing in METRICS"
    more = {key: None if isinstance(given, float) and not math.isfinite(given) else given for key, given in more.items()}
    return Row(model=model, metric=metric, setting=setting, value=value if math.isfinite(value) else None, ratio=None, **more)


def shown(row: Row) -> str:
    """The value as text."""
    return "not finite" if row["value"] is None else METRICS[row["metric"]].text(row["value"])


def with_error(row: Row) -> str:
    """The value as text, and its standard error where it has one."""
    error = row.get("stderr")
    return shown(row) + (f" ± {METRICS[row['metric']].text(error)}" if error is not None else "")


def arrange(rows: list[Row], models: list[str]) -> list[Row]:
    """Rows grouped by metric and setting in order of first appearance, models in the given order, ratios to the first of several models."""
    groups = list(dict.fromkeys((row["metric"], row["setting"]) for row in rows))
    ordered = sorted(rows, key=lambda row: (groups.index((row["metric"], row["setting"])), models.index(row["model"])))
    reference = {(row["metric"], row["setting"]): row["value"] for row in rows if len(models) > 1 and row["model"] == models[0]}
    return [{**row, "ratio": _ratio(row["value"], reference.get((row["metric"], row["setting"])))} for row in ordered]


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
