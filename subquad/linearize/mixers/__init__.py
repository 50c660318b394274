"""Presets: what a mixer name in a recipe stands for. Adding one is adding a row here."""

from dataclasses import dataclass, field
from typing import Any

from subquad.errors import UserError
from subquad.linearize.mixers.base import HeadShape, Mixer
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS
from subquad.registry import check_name, lookup, nearest

# Stand-alone mixers: name -> "module:class". A preset says which one it uses and with which pieces.
CLASSES = {
    "window": "subquad.linearize.mixers.window:Window",
    "cell": "subquad.linearize.mixers.cell:Cell",
}

# What a cell's options may be; other presets take none.
CHOICES = {
    "feature_map": tuple(FEATURE_MAPS),
    "decay": ("none", "scalar", "vector"),
    "write": ("additive", "delta"),
    "combine": ("joint", "gated"),
    "mass": float,
    "rank": int,
}


@dataclass(frozen=True)
class Preset:
    about: str
    seeds: str
    uses: str = "cell"
    pieces: dict[str, Any] = field(default_factory=dict)


MIXERS = {
    "window": Preset("sinks + sliding window, nothing trained", "C04 C05", "window"),
    "window_linear": Preset(
        "window + linear attention of everything older under one normaliser, Hedgehog features",
        "A03 G02",
        pieces=dict(feature_map="hedgehog_softmax", decay="none", write="additive", combine="joint", mass=-1.0),
    ),
    "gla": Preset(
        "window + vector-gated linear attention, each with its own normaliser, mixed by a gate (Lizard)",
        "C01",
        pieces=dict(feature_map="hedgehog_softmax", decay="vector", write="additive", combine="gated", mass=-2.0),
    ),
    "gated_delta": Preset(
        "window + gated delta rule, mixed by a gate",
        "B01",
        pieces=dict(feature_map="unit", decay="scalar", write="delta", combine="gated", mass=-2.0),
    ),
}


def pieces(name: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The preset's pieces with the user's options on top. Raises UserError for unknown names, options or values, all at once."""
    check_name("mixer", name, MIXERS)
    preset, problems = MIXERS[name], []
    for key, value in (options or {}).items():
        if preset.uses != "cell":
            problems.append(f"options.{key}: mixer {name!r} takes no options.")
        elif key not in CHOICES:
            problems.append(f"options.{key}: no such option.{nearest(key, CHOICES)} Known: {', '.join(CHOICES)}.")
        elif isinstance(CHOICES[key], tuple) and value not in CHOICES[key]:
            problems.append(f"options.{key}: got {value!r}, allowed: {', '.join(CHOICES[key])}.")
        elif CHOICES[key] in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, CHOICES[key]))):
            problems.append(f"options.{key}: expected a {CHOICES[key].__name__}, got {value!r}.")
    merged = {**preset.pieces, **(options or {})}
    if not problems and preset.uses == "cell":
        problems += _clashes(name, merged)
    if problems:
        raise UserError(*problems)
    return merged


def _clashes(name: str, pieces: dict[str, Any]) -> list[str]:
    positive = FEATURE_MAPS[pieces["feature_map"]].positive
    found = []
    if pieces["write"] == "delta" and positive:
        found.append(f"mixer {name!r}: write delta needs unit-length keys; use feature_map unit, not {pieces['feature_map']}.")
    if pieces["write"] == "delta" and (pieces["combine"] != "gated" or pieces["decay"] == "vector"):
        found.append(f"mixer {name!r}: write delta goes with combine gated and decay none or scalar.")
    if pieces["write"] == "additive" and not positive:
        found.append(
            f"mixer {name!r}: write additive divides by a sum of features and needs a positive map; {pieces['feature_map']} is signed."
        )
    return found


def mixer_class(name: str) -> type[Mixer]:
    check_name("mixer", name, MIXERS)
    return lookup("mixer class", MIXERS[name].uses, CLASSES)


def build(name: str, shape: HeadShape, window: int, sinks: int, options: dict[str, Any] | None = None) -> Mixer:
    """A fresh mixer for heads of `shape`."""
    return mixer_class(name)(shape, window, sinks, **pieces(name, options))
