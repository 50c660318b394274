"""Make a plan from a model or from its config alone, and check it.

Key: G key/value heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from subquad.errors import UserError, raise_all
from subquad.linearize.mixers import MIXERS, pieces
from subquad.linearize.plan import LayerPlan, Plan
from subquad.linearize.seam import HARMLESS, HONOURED, REFUSED
from subquad.linearize.shapes import Found, attention_layers

# The config's layer types that a mixer can stand in for. A sliding window stays at most as long as the teacher's.
FULL = ("full_attention", "hybrid")
CONVERTIBLE = (*FULL, "sliding_attention", "hybrid_sliding")
_REFUSED = "refused: "

Heads = Sequence[int | Mapping[int, Sequence[int]]] | Mapping[int, Sequence[int]]


def plan(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    mixer: str = "window",
    window: int = 64,
    sinks: int = 4,
    exact: Heads | None = None,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Say what would become what; nothing is changed and no weights are needed.

    mixer: a row of MIXERS. window, sinks: tokens. exact: layers that stay as they are, {layer: key/value heads that stay exact}, or a list of both.
    layers: convert only these. Default: every full-attention layer; layers where the teacher runs a window of its own only when they are named,
    or when the model has no others.
    options: the mixer's own (feature_map, decay, ...). Raises UserError with every problem found.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    cls = None if isinstance(model_or_config, PreTrainedConfig) else _teacher_class(model_or_config)
    found = attention_layers(config, cls)
    options = dict(options or {})
    pieces(mixer, options)
    heads = _heads(exact)
    problems = _check_numbers(window, sinks) + _check_layers(found, heads, layers)
    raise_all(problems)
    if layers is None and all(_own(f) for f in found):
        layers = [f.index for f in found if f.kind in CONVERTIBLE] or None
    if not any(f.causal for f in found) and MIXERS[mixer].uses == "cell":
        options = {**options, "combine": "alone"}  # an encoder reads all tokens at once: there is nothing older than a window
        pieces(mixer, options, both_ways="bidirectional" in MIXERS[mixer].directions)  # other presets are refused as a whole below
    rows = [_layer(f, mixer, window, sinks, heads.get(f.index, ()), layers) for f in found]
    raise_all(_refusals(rows, config.model_type))
    if not any(row.mixer for row in rows):
        reasons = "; ".join(sorted({row.why or "kept exact" for row in rows}))
        raise UserError(f"Nothing to convert in {config.model_type!r}: {reasons}. Name layers, or keep fewer of them exact.")
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return Plan(tuple(rows), mixer, window, sinks, options, config.model_type, dtype)


def with_exact(base: Plan, exact: Mapping[int, Sequence[int]]) -> Plan:
    """The same plan with other key/value heads kept exact: {layer: heads}."""
    rows = []
    for row in base.layers:
        if row.mixer is None:
            rows.append(row)
            continue
        kept = tuple(sorted(exact.get(row.index, ())))
        rows.append(
            replace(row, mixer=None, exact=(), window=0, sinks=0, why="kept exact")
            if len(kept) == row.kv_heads
            else replace(row, exact=kept)
        )
    return replace(base, layers=tuple(rows))


def _teacher_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return getattr(type(model), "teacher_class", type(model))


def _check_numbers(window: int, sinks: int) -> list[str]:
    problems = []
    if window < 1:
        problems.append(f"window: got {window}, a window holds at least 1 token.")
    if sinks < 0:
        problems.append(f"sinks: got {sinks}, allowed: 0 or more.")
    return problems


def _check_layers(found: list[Found], heads: Mapping[int, Sequence[int] | None], layers: Sequence[int] | None) -> list[str]:
    kv = {f.index: f.kv_heads for f in found}
    known = f"layers with attention: {_ranges(sorted(kv))}"
    problems = [f"layers: {i} is not an attention layer; {known}." for i in layers or () if i not in kv]
    for i, kept in heads.items():
        if i not in kv:
            problems.append(f"exact: {i} is not an attention layer; {known}.")
        else:
            problems += [f"exact: layer {i} has key/value heads 0..{kv[i] - 1}, got {g}." for g in kept or () if not 0 <= g < kv[i]]
    return problems


def _ranges(numbers: list[int]) -> str:
    return (
        f"{numbers[0]}..{numbers[-1]}"
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        else ", ".join(map(str, numbers))
    )


def _heads(exact: Heads | None) -> dict[int, tuple[int, ...] | None]:
    """{layer: heads}; None stands for all heads."""
    kept: dict[int, tuple[int, ...] | None] = {}
    for entry in [exact] if isinstance(exact, Mapping) else exact or ():
        for layer, heads in entry.items() if isinstance(entry, Mapping) else [(entry, None)]:
            before = kept.get(layer, ())
            kept[layer] = None if heads is None or before is None else tuple(sorted({*before, *heads}))
    return kept


def _own(f: Found) -> bool:
    """The teacher already runs something cheaper than full attention here."""
    return f.window is not None or f.kind not in FULL


def _layer(f: Found, mixer: str, window: int, sinks: int, kept: tuple[int, ...] | None, layers: Sequence[int] | None) -> LayerPlan:
    named = layers is not None and f.index in layers
    row = LayerPlan(f.index, f.name, f.hidden, f.kv_heads, f.query_heads // f.kv_heads, f.key, f.value, f.kind, f.window, f.cached)
    if layers is not None and not named:
        return replace(row, why="not named")
    if kept is None or len(kept) == f.kv_heads:
        return replace(row, why="kept exact")
    if _own(f) and not named:
        return replace(row, why=f"the teacher runs {f.kind if f.window is None else f'a window of {f.window}'} here")
    problem = _refusal(f, mixer)
    if problem:
        return replace(row, why=_REFUSED + problem)
    if f.window is not None:
        window = min(window, f.window)
    return replace(row, mixer=mixer, exact=kept, window=window, sinks=sinks)


def _refusals(rows: list[LayerPlan], model_type: str) -> list[str]:
    """One sentence for all layers that are refused for the same reason."""
    layers: dict[str, set[int]] = {}
    for row in rows:
        if row.why.startswith(_REFUSED):
            layers.setdefault(row.why.removeprefix(_REFUSED), set()).add(row.index)
    return [f"Layer{'s' * (len(which) > 1)} {_ranges(sorted(which))} of {model_type!r}: {why}" for why, which in layers.items()]


def _refusal(f: Found, mixer: str) -> str:
    """Why no mixer can stand here; nothing if one can."""
    refused = [a for a in f.arguments if a in REFUSED or (a in f.tensors and a not in HONOURED | HARMLESS)]
    if refused:
        return f"its attention takes {', '.join(refused)}, which a mixer cannot honour. Keep it exact."
    if f.problem:
        return f.problem
    direction = "causal" if f.causal else "bidirectional"
    if direction not in MIXERS[mixer].directions:
        others = [name for name, preset in MIXERS.items() if direction in preset.directions]
        return f"its attention is {direction} and mixer {mixer!r} is not. Mixers that are: {', '.join(others)}."
    if f.query_heads % f.kv_heads:
        return f"{f.query_heads} query heads do not divide over {f.kv_heads} key/value heads."
    if f.kind not in CONVERTIBLE:
        return f"the teacher runs {f.kind} here, which a window or a state would not be. Leave it out of `layers`."
    return ""
