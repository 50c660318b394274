"""Make a plan from a model or from its config alone, and check it.

Key: G key/value heads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from subquad.errors import UserError, raise_all
from subquad.linearize.mixers import MIXERS, mixer_class, pieces
from subquad.linearize.plan import LayerPlan, Plan
from subquad.linearize.seam import HARMLESS, HONOURED, REFUSED
from subquad.linearize.shapes import Found, attention_layers

# The config's layer types that a mixer can stand in for. A sliding window stays at most as long as the teacher's.
FULL = ("full_attention", "hybrid")
CONVERTIBLE = (*FULL, "sliding_attention", "hybrid_sliding")
_REFUSED = "refused: "
_OPEN = "Open one with transformers: AutoModelForCausalLM.from_pretrained(...)."
# What a plan must say as the model has it.
SIZES = ("index", "hidden", "kv_heads", "groups", "key", "value", "teacher_window")

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

    mixer: a row of MIXERS. window, sinks: tokens.
    exact: layers that stay as they are, {layer: key/value heads that stay exact}, or a list of both; one layer is [layer], too.
    layers: convert only these. Default: every full-attention layer; layers where the teacher runs a window of its own only when they are named,
    or when the model has no others.
    options: the mixer's own (feature_map, decay, ...). Raises UserError with every problem found.
    """
    if not isinstance(model_or_config, PreTrainedConfig | PreTrainedModel):
        raise UserError(f"plan takes a transformers model or its config, got {_given(model_or_config)}. {_OPEN}")
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    cls = None if isinstance(model_or_config, PreTrainedConfig) else _teacher_class(model_or_config)
    found = attention_layers(config, cls)
    options = dict(options or {})
    merged, wrong = pieces(mixer, options), _check_forms(exact, layers)
    heads = {} if wrong else _heads(exact)
    raise_all(_check_numbers(window, sinks) + (wrong or _check_layers(found, heads, layers)))
    if layers is None and all(_own(f) for f in found):
        layers = [f.index for f in found if f.kind in CONVERTIBLE] or None
    if not any(f.causal for f in found) and MIXERS[mixer].uses == "cell":
        options = {**options, "combine": "alone"}  # an encoder reads all tokens at once: there is nothing older than a window
        merged = pieces(mixer, options, both_ways="bidirectional" in MIXERS[mixer].directions)  # other presets are refused as a whole below
    rows = [_layer(f, mixer, window, sinks, heads.get(f.index, ()), layers, merged) for f in found]
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


def check_fits(model: PreTrainedModel, made: Plan) -> None:
    """Raise UserError unless the converted layers of `made` are the model's own, size by size. Names that it does not have are left to `attach`."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"linearize takes a transformers model, got {_given(model)}. {_OPEN}")
    if not isinstance(made, Plan):
        raise UserError(f"linearize takes a plan, got {_given(made)}. Make one: subquad.plan(model, ...).")
    found = {f.name: _row(f) for f in attention_layers(model.config, _teacher_class(model))}
    problems = []
    for layer in made.converted:
        other = [name for name in SIZES if layer.name in found and getattr(layer, name) != getattr(found[layer.name], name)]
        if other:
            said, has = (", ".join(f"{name} {getattr(row, name)}" for name in other) for row in (layer, found[layer.name]))
            problems.append(
                (layer.index, f"the plan says {said}, the model has {has}. Make the plan from this model: subquad.plan(model, ...).")
            )
    raise_all(_grouped(problems, model.config.model_type))


def _given(x: Any) -> str:
    return f"{x!r} ({type(x).__name__})" if isinstance(x, str | int | float) or x is None else f"a {type(x).__name__}"


def _teacher_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return getattr(type(model), "teacher_class", type(model))


def _check_numbers(window: int, sinks: int) -> list[str]:
    problems = [f"{name}: got {x!r}, expected a whole number." for name, x in (("window", window), ("sinks", sinks)) if not _whole(x)]
    if _whole(window) and window < 1:
        problems.append(f"window: got {window}, a window holds at least 1 token.")
    if _whole(sinks) and sinks < 0:
        problems.append(f"sinks: got {sinks}, allowed: 0 or more.")
    return problems


def _check_forms(exact: Any, layers: Any) -> list[str]:
    """Nothing but lists of whole numbers: a number alone could be a layer or how many, and one in quotes would match no layer."""
    problems = []
    if layers is not None and not _wholes(layers):
        problems.append(f"layers: got {layers!r}, expected a list of layers (whole numbers), for example [0, 3].")
    entries = _entries(exact)
    heads = [entry for entry in entries if isinstance(entry, Mapping)] if _listed(entries) else []
    if (
        not _listed(entries)
        or not _wholes([entry for entry in entries if not isinstance(entry, Mapping)])
        or not all(_wholes(entry) and all(map(_wholes, entry.values())) for entry in heads)
    ):
        problems.append(
            f"exact: got {exact!r}, expected layers (whole numbers), key/value heads of layers, or both: [0, 3], {{3: [0, 1]}}, [0, {{3: [0, 1]}}]."
        )
    return problems


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _listed(x: Any) -> bool:
    return isinstance(x, Collection) and not isinstance(x, str | bytes)


def _wholes(x: Any) -> bool:
    return _listed(x) and all(map(_whole, x))


def _check_layers(found: list[Found], heads: Mapping[int, Sequence[int] | None], layers: Sequence[int] | None) -> list[str]:
    kv = {f.index: f.kv_heads for f in found}
    known = f"layers with attention: {_ranges(sorted(kv))}"
    problems = [f"layers: {i} is not an attention layer; {known}." for i in ([] if layers is None else layers) if i not in kv]
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


def _entries(exact: Any) -> Any:
    return [exact] if isinstance(exact, Mapping) else [] if exact is None else exact


def _heads(exact: Heads | None) -> dict[int, tuple[int, ...] | None]:
    """{layer: heads}; None stands for all heads."""
    kept: dict[int, tuple[int, ...] | None] = {}
    for entry in _entries(exact):
        for layer, heads in entry.items() if isinstance(entry, Mapping) else [(entry, None)]:
            before = kept.get(layer, ())
            kept[int(layer)] = None if heads is None or before is None else tuple(sorted({*before, *map(int, heads)}))
    return kept


def _own(f: Found) -> bool:
    """The teacher already runs something cheaper than full attention here."""
    return f.window is not None or f.kind not in FULL


def _row(f: Found) -> LayerPlan:
    """The layer as the teacher has it."""
    return LayerPlan(f.index, f.name, f.hidden, f.kv_heads, f.query_heads // f.kv_heads, f.key, f.value, f.kind, f.window, f.cached)


def _layer(
    f: Found,
    mixer: str,
    window: int,
    sinks: int,
    kept: tuple[int, ...] | None,
    layers: Sequence[int] | None,
    merged: Mapping[str, Any],
) -> LayerPlan:
    named, row = layers is not None and f.index in layers, _row(f)
    if layers is not None and not named:
        return replace(row, why="not named")
    if kept is None or len(kept) == f.kv_heads:
        return replace(row, why="kept exact")
    if _own(f) and not named:
        return replace(row, why=f"the teacher runs {f.kind if f.window is None else f'a window of {f.window}'} here")
    if f.window is not None:
        window = min(window, f.window)
    converted = replace(row, mixer=mixer, exact=kept, window=int(window), sinks=int(sinks))
    problem = _refusal(f, mixer) or mixer_class(mixer).misfit(converted.soft_shape, **merged)
    return replace(row, why=_REFUSED + problem) if problem else converted


def _refusals(rows: list[LayerPlan], model_type: str) -> list[str]:
    return _grouped([(row.index, row.why.removeprefix(_REFUSED)) for row in rows if row.why.startswith(_REFUSED)], model_type)


def _grouped(found: list[tuple[int, str]], model_type: str) -> list[str]:
    """One sentence for all layers that have the same problem."""
    layers: dict[str, set[int]] = {}
    for index, why in found:
        layers.setdefault(why, set()).add(index)
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
