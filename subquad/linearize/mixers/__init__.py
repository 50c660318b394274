"""Mixers by name: presets (presets.py), the classes they use, and the checks of their options."""

from typing import Any

from subquad.errors import raise_all
from subquad.linearize.mixers.base import HeadShape, Mixer
from subquad.linearize.mixers.knobs import DEFAULTS, KNOB_CHOICES, READ_BY, clashes, clashes_both_ways
from subquad.linearize.mixers.presets import MIXERS, Preset
from subquad.linearize.mixers.score_weights import WEIGHTS, weight_clashes
from subquad.registry import check_name, lookup, nearest

__all__ = ["CHOICES", "CLASSES", "MIXERS", "Preset", "build", "causal", "mixer_class", "pieces"]

# Name -> "module:class". A preset says which one it uses and with which pieces.
CLASSES = {
    "window": "subquad.linearize.mixers.window:Window",
    "cell": "subquad.linearize.mixers.cell:Cell",
    "full": "subquad.linearize.mixers.full:Full",
    "nsa": "subquad.linearize.mixers.sparse:NativeSparse",
    "delta_attention": "subquad.linearize.mixers.sparse:DeltaCorrection",
    "agent": "subquad.linearize.mixers.whole:Agent",
    "relative": "subquad.linearize.mixers.whole:RelativeFavor",
    "shared_key": "subquad.linearize.mixers.shared_key:SharedKey",
}

# What the options of a class may be; classes that are not here take none.
CHOICES = {
    "cell": KNOB_CHOICES,
    "full": {"weights": tuple(WEIGHTS), "forget": bool, "gated": bool, "blocks": bool, "near": bool, "top": int},
    "nsa": {"top": int},
    "delta_attention": {"stride": int},
    "agent": {"agents": int},
    "relative": {"span": int, "features": int},
}

MAY_BE_ZERO = ("features", "cache")

# Class -> what of its options only some pieces read (knobs.py says how); its options as they are; sentences about what does not go together.
COUNTS = {"cell": READ_BY, "full": {"top": [{"blocks": (True,)}]}}
STARTS = {"cell": DEFAULTS}
CLASHES = {"cell": clashes, "full": weight_clashes}


def causal() -> tuple[str, ...]:
    """Names of the presets for decoders."""
    return tuple(name for name, preset in MIXERS.items() if "causal" in preset.directions)


def pieces(name: str, options: dict[str, Any] | None = None, both_ways: bool = False) -> dict[str, Any]:
    """The preset's pieces with the user's options on top; both_ways: for attention without a direction. Raises UserError for unknown names,
    options or values, all at once."""
    check_name("mixer", name, MIXERS)
    preset, problems = MIXERS[name], []
    choices = CHOICES.get(preset.uses, {})
    for key, value in (options or {}).items():
        if not choices:
            problems.append(f"options.{key}: mixer {name!r} takes no options.")
        elif key not in choices:
            problems.append(f"options.{key}: no such option.{nearest(key, choices)} Known: {', '.join(choices)}.")
        elif isinstance(choices[key], tuple) and value not in choices[key]:
            problems.append(f"options.{key}: got {value!r}, allowed: {', '.join(choices[key])}.")
        elif choices[key] is bool and not isinstance(value, bool):
            problems.append(f"options.{key}: expected true or false, got {value!r}.")
        elif choices[key] in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, choices[key]))):
            problems.append(f"options.{key}: expected a {choices[key].__name__}, got {value!r}.")
        elif choices[key] is int and value < (least := 0 if key in MAY_BE_ZERO else 1):
            problems.append(f"options.{key}: got {value}, allowed: {least} or more.")
    merged = {**preset.pieces, **(options or {})}
    chosen = {**STARTS.get(preset.uses, {}), **merged}
    if not problems and preset.uses in CLASHES:
        problems += CLASHES[preset.uses](name, chosen)
    if not problems and both_ways and preset.uses == "cell":
        problems += clashes_both_ways(name, chosen)
    raise_all(problems or unread(name, options or {}))
    return merged


def unread(name: str, options: dict[str, Any]) -> list[str]:
    """Sentences about options that change a value and that none of the chosen pieces reads."""
    uses = MIXERS[name].uses
    conditions, plain = COUNTS.get(uses, {}), {**STARTS.get(uses, {}), **MIXERS[name].pieces}
    chosen, problems = {**plain, **options}, []
    for key, value in options.items():
        lacking = None if value == plain.get(key) else _missed(key, chosen, conditions)
        if lacking:
            have = ", ".join(f"{knob}={chosen.get(knob, False)}" for knob in lacking if knob != key)
            counts = "; ".join(f"{knob}={' or '.join(map(str, rows))}" for knob, rows in lacking.items())
            problems.append(f"options.{key}: mixer {name!r} does not read it with {have}. It counts with {counts}.")
    return problems


def _missed(key: str, chosen: dict[str, Any], conditions: dict[str, list[dict[str, tuple]]]) -> dict[str, tuple] | None:
    """The first condition of an option that no chosen piece meets; a piece that is not read itself meets none."""
    for condition in conditions.get(key, ()):
        met = (knob for knob, rows in condition.items() if chosen.get(knob) in rows)
        if not any(knob == key or _missed(knob, chosen, conditions) is None for knob in met):
            return condition
    return None


def mixer_class(name: str) -> type[Mixer]:
    check_name("mixer", name, MIXERS)
    return lookup("mixer class", MIXERS[name].uses, CLASSES)


def build(name: str, shape: HeadShape, window: int, sinks: int, options: dict[str, Any] | None = None) -> Mixer:
    """A fresh mixer for heads of `shape`."""
    return mixer_class(name)(shape, window, sinks, **pieces(name, options))
