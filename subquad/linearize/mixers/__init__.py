"""Mixers by name: presets (presets.py), the classes they use, and the checks of their options."""

from typing import Any

from subquad.errors import UserError
from subquad.linearize.mixers.base import HeadShape, Mixer
from subquad.linearize.mixers.cell import DEFAULTS
from subquad.linearize.mixers.combine import COMBINES
from subquad.linearize.mixers.decays import DECAYS
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS
from subquad.linearize.mixers.key_weights import KEY_WEIGHTS
from subquad.linearize.mixers.normalisers import NORMALISERS
from subquad.linearize.mixers.outputs import OUTPUTS
from subquad.linearize.mixers.positions import POSITIONS
from subquad.linearize.mixers.presets import MIXERS, Preset
from subquad.linearize.mixers.score_weights import WEIGHTS
from subquad.linearize.mixers.writes import WRITES
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

CONTAINERS = ("plain", "gated_slots", "softmax_slots", "partitions", "levels")

# What the options of a class may be; classes that are not here take none.
CHOICES = {
    "cell": {
        "feature_map": tuple(FEATURE_MAPS),
        "decay": tuple(DECAYS),
        "write": tuple(WRITES),
        "normaliser": tuple(NORMALISERS),
        "key_weight": tuple(KEY_WEIGHTS),
        "position": tuple(POSITIONS),
        "output": tuple(OUTPUTS),
        "container": CONTAINERS,
        "combine": tuple(COMBINES),
        "mass": float,
        "rank": int,
        "features": int,
        "horizon": int,
        "slots": int,
        "partitions": int,
        "top": int,
    },
    "full": {"weights": tuple(WEIGHTS), "forget": bool, "gated": bool, "blocks": bool, "near": bool, "top": int},
    "nsa": {"top": int},
    "delta_attention": {"stride": int},
    "agent": {"agents": int},
    "relative": {"span": int, "features": int},
}


def causal() -> tuple[str, ...]:
    """Names of the presets for decoders."""
    return tuple(name for name, preset in MIXERS.items() if "causal" in preset.directions)


def pieces(name: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The preset's pieces with the user's options on top. Raises UserError for unknown names, options or values, all at once."""
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
        elif choices[key] is int and value < (0 if key == "features" else 1):
            problems.append(f"options.{key}: got {value}, allowed: {0 if key == 'features' else 1} or more.")
    merged = {**preset.pieces, **(options or {})}
    if not problems and preset.uses == "cell":
        problems += _clashes(name, {**DEFAULTS, **merged})
    if problems:
        raise UserError(*problems)
    return merged


def _clashes(name: str, p: dict[str, Any]) -> list[str]:
    """Pieces that do not go together."""
    row, norm, decay, write = FEATURE_MAPS[p["feature_map"]], NORMALISERS[p["normaliser"]], DECAYS[p["decay"]], WRITES[p["write"]]
    joint = COMBINES[p["combine"]].joint
    if p["container"].endswith("slots"):
        wrong = [key for key in ("decay", "write", "normaliser", "key_weight") if p[key] != DEFAULTS[key]]
        wrong += ["position"] if POSITIONS[p["position"]].phases else []
        return [f"mixer {name!r}: {key} {p[key]} does not go with slots, which have gates and a softmax of their own." for key in wrong]
    found = []
    if p["container"] == "levels" and (
        write.corrects or norm.counts or p["key_weight"] != "none" or p["normaliser"] == "feature" or row.exponential
    ):
        found.append(
            f"mixer {name!r}: container levels goes with write additive, normaliser sum, clamped or none, and a map without exponents."
        )
    if write.corrects:
        if not p["feature_map"].startswith("unit") and p["feature_map"] != "silu_unit":
            found.append(
                f"mixer {name!r}: write {p['write']} needs unit-length keys; use feature_map unit or silu_unit, not {p['feature_map']}."
            )
        if joint:
            found.append(f"mixer {name!r}: write {p['write']} goes with combine gated, added or alone, not {p['combine']}.")
        if p["container"] == "partitions" or p["key_weight"] != "none":
            found.append(f"mixer {name!r}: write {p['write']} goes with container plain and key_weight none.")
    elif (joint or norm.divides) and (not row.positive or POSITIONS[p["position"]].phases):
        found.append(
            f"mixer {name!r}: combine {p['combine']} with normaliser {p['normaliser']} divides by a sum of features and needs a positive map without "
            f"phases; got {p['feature_map']}, {p['position']}. Use normaliser none with an output norm."
        )
    if write.decays is not None and p["decay"] not in write.decays:
        found.append(f"mixer {name!r}: write {p['write']} goes with decay {' or '.join(write.decays)}, got {p['decay']}.")
    if decay.module is not None and (norm.counts or p["normaliser"] == "feature"):
        found.append(f"mixer {name!r}: normaliser {p['normaliser']} counts tokens, so nothing may fade: use decay none, not {p['decay']}.")
    if decay.vector and row.exponential:
        found.append(f"mixer {name!r}: feature_map {p['feature_map']} goes with decay none or one per head, not {p['decay']}.")
    if p["write"] == "selective" and (
        joint or p["normaliser"] != "none" or p["container"] != "plain" or p["key_weight"] != "none" or row.exponential
    ):
        found.append(
            f"mixer {name!r}: write selective goes with normaliser none, container plain, key_weight none and a map without exponents."
        )
    if (p["key_weight"] == "flow") != (p["normaliser"] == "flow"):
        found.append(f"mixer {name!r}: key_weight flow and normaliser flow go together.")
    if decay.reads == "key" and features_differ(p):
        found.append(f"mixer {name!r}: decay {p['decay']} has one number per key channel and needs a feature map of that size.")
    if p["key_weight"] != "none" and (row.exponential or features_differ(p)):
        found.append(f"mixer {name!r}: key_weight {p['key_weight']} needs a feature map with one feature per key channel.")
    return found


def features_differ(p: dict[str, Any]) -> bool:
    """The map has another number of features than the key has channels."""
    row = FEATURE_MAPS[p["feature_map"]]
    return bool(row.module and p["feature_map"] not in ("focused", "normed", "polynomial")) or row.factor != 1 or row.width is not None


def mixer_class(name: str) -> type[Mixer]:
    check_name("mixer", name, MIXERS)
    return lookup("mixer class", MIXERS[name].uses, CLASSES)


def build(name: str, shape: HeadShape, window: int, sinks: int, options: dict[str, Any] | None = None) -> Mixer:
    """A fresh mixer for heads of `shape`."""
    return mixer_class(name)(shape, window, sinks, **pieces(name, options))
