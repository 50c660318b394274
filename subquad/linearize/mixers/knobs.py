"""The knobs of a cell: their tables, what a preset may leave out, and which pieces do not go together. A file per knob; this one joins them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from subquad.linearize.mixers.combine import COMBINES, CombineRow
from subquad.linearize.mixers.containers import CONTAINERS, ContainerRow
from subquad.linearize.mixers.decays import DECAYS, DecayRow
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, FeatureMap, features_of
from subquad.linearize.mixers.key_weights import KEY_WEIGHTS, KeyWeightRow
from subquad.linearize.mixers.normalisers import NORMALISERS, NormaliserRow
from subquad.linearize.mixers.outputs import OUTPUTS, OutputRow
from subquad.linearize.mixers.positions import POSITIONS, PositionRow
from subquad.linearize.mixers.writes import WRITES, WriteRow

TABLES = {
    "feature_map": FEATURE_MAPS, "decay": DECAYS, "write": WRITES, "normaliser": NORMALISERS, "key_weight": KEY_WEIGHTS,
    "position": POSITIONS, "output": OUTPUTS, "container": CONTAINERS, "combine": COMBINES,
}  # fmt: skip

# The pieces a preset may leave out.
DEFAULTS = dict(
    feature_map="identity", decay="none", write="additive", normaliser="sum", key_weight="none", position="keep", output="none", container="plain",
    combine="joint", mass=-4.0, rank=16, features=0, horizon=8192, slots=64, partitions=4, top=2, cache=0,
    fit_share=True, fit_map=True, fit_concentration=False, fit_decay=False,
)  # fmt: skip

# What each may be: a row's name, or a number.
KNOB_CHOICES = {name: tuple(TABLES[name]) if name in TABLES else type(start) for name, start in DEFAULTS.items()}


def _rows(table: dict[str, Any], holds: Callable[[Any], bool]) -> tuple[str, ...]:
    return tuple(name for name, row in table.items() if holds(row))


def _takers(option: str) -> dict[str, tuple[str, ...]]:
    """Knob -> its rows that read the option."""
    found = {knob: _rows(table, lambda row: option in getattr(row, "takes", ())) for knob, table in TABLES.items()}
    return {knob: names for knob, names in found.items() if names}


# What is read by some rows only: all of the conditions must hold, each by one of its knobs.
_SEPARATE = _rows(COMBINES, lambda row: not row.joint)  # the branch has an output of its own
READ_BY = {option: [_takers(option)] for option in ("mass", "rank", "features", "horizon", "slots", "partitions", "top")} | {
    "output": [{"combine": _SEPARATE}],
    "normaliser": [
        {"combine": _SEPARATE, "normaliser": _rows(NORMALISERS, lambda row: row.per_feature)},
        {"write": _rows(WRITES, lambda row: not row.corrects)},
    ],
}


@dataclass(frozen=True)
class Rows:
    """The rows that the names of a cell's pieces stand for."""

    feature_map: FeatureMap
    decay: DecayRow
    write: WriteRow
    normaliser: NormaliserRow
    key_weight: KeyWeightRow
    position: PositionRow
    output: OutputRow
    container: ContainerRow
    combine: CombineRow


def rows_of(pieces: dict[str, Any]) -> Rows:
    return Rows(**{knob: table[pieces[knob]] for knob, table in TABLES.items()})


def map_options(pieces: dict[str, Any]) -> dict[str, Any]:
    """What maps with parameters or buffers of their own are built with."""
    return dict(features=pieces["features"], horizon=pieces["horizon"])


def per_channel(pieces: dict[str, Any]) -> bool:
    """The map has one feature per key channel, whatever the size of the key."""
    return all(features_of(pieces["feature_map"], size, map_options(pieces)) == size for size in (61, 67))


def clashes(name: str, p: dict[str, Any]) -> list[str]:
    """Sentences about pieces of preset `name` that do not go together; `p` has every knob."""
    r = rows_of(p)
    joint, exponential = r.combine.joint, bool(r.feature_map.exponential)
    if r.container.slots:
        return [f"mixer {name!r}: {problem}" for problem in slot_clashes(p, r)]
    found = recurrence_clashes(p, r)
    alone = not r.combine.older or p["container"] != "plain" or r.key_weight.rule or r.position.phases or r.feature_map.positions
    if p["cache"] and (alone or r.normaliser.counts or r.normaliser.per_feature or r.write.bare or r.write.more):
        found.append(
            "options.cache keeps pairs between window and state: it goes with a window that tokens leave for the state, container plain, key_weight none, "
            "position keep or drop, a map that does not ask for positions, a normaliser without sums of its own and a write with one state."
        )
    if p["container"] == "levels" and (r.normaliser.counts or r.normaliser.per_feature):
        found.append(
            f"normaliser {p['normaliser']} asks for sums over all tokens, which container levels keeps in blocks; use sum, clamped or none."
        )
    if r.write.corrects:
        if not r.feature_map.unit:
            found.append(f"write {p['write']} needs unit-length keys; use feature_map unit or silu_unit, not {p['feature_map']}.")
        if joint:
            found.append(f"write {p['write']} goes with combine gated, added, sequential or alone, not {p['combine']}.")
        if r.container.times or r.key_weight.rule:
            found.append(f"write {p['write']} corrects what it wrote by key: container partitions and key weights do not go with it.")
    elif (joint or r.normaliser.divides) and (not r.feature_map.positive or r.position.phases):
        found.append(
            f"combine {p['combine']} with normaliser {p['normaliser']} divides by a sum of features and needs a positive map without "
            f"phases; got {p['feature_map']}, {p['position']}. Use normaliser none with an output norm."
        )
    if r.decay.module is not None and (r.normaliser.counts or r.normaliser.per_feature):
        found.append(f"normaliser {p['normaliser']} counts tokens, so nothing may fade: use decay none, not {p['decay']}.")
    if exponential and not joint and not r.normaliser.divides:
        found.append(
            f"feature_map {p['feature_map']} is kept in range by the sum it is divided by: normaliser {p['normaliser']} does not divide."
        )
    if r.decay.vector and exponential:
        found.append(f"feature_map {p['feature_map']} goes with decay none or one per head, not {p['decay']}.")
    if r.write.bare and (
        joint or p["normaliser"] != "none" or p["container"] != "plain" or r.key_weight.rule or exponential or r.position.phases
    ):
        found.append(
            f"write {p['write']} goes with normaliser none, container plain, key_weight none, position keep or drop and a map without exponents."
        )
    if (p["key_weight"] == "flow") != (p["normaliser"] == "flow"):
        found.append("key_weight flow and normaliser flow go together.")
    if r.decay.reads == "key" and not per_channel(p):
        found.append(f"decay {p['decay']} has one number per key channel and needs a feature map of that size.")
    if r.key_weight.rule and (exponential or not per_channel(p)):
        found.append(f"key_weight {p['key_weight']} needs a feature map with one feature per key channel.")
    return [f"mixer {name!r}: {problem}" for problem in found]


def recurrence_clashes(p: dict[str, Any], r: Rows) -> list[str]:
    """Write, decay and what holds their state."""
    found = []
    if r.container.reads and r.write.read not in r.container.reads:
        writes = " or ".join(
            name for name, row in WRITES.items() if row.read in r.container.reads and not (row.complement and r.container.slots)
        )
        found.append(f"container {p['container']} goes with write {writes}, got {p['write']}: it has no form for another recurrence.")
    if r.write.decays is not None and p["decay"] not in r.write.decays:
        found.append(f"write {p['write']} goes with decay {' or '.join(r.write.decays)}, got {p['decay']}.")
    return found


def slot_clashes(p: dict[str, Any], r: Rows) -> list[str]:
    """Slots hold keys and values, so there is nothing to map or to divide; some have gates of their own in the place of decay and write."""
    held = ("feature_map", "normaliser", "key_weight", "cache")
    wrong = [key for key in (("decay", "write") if r.container.own else ()) + held if p[key] != DEFAULTS[key]]
    wrong += ["position"] if r.position.phases else []
    gates = "gates and a softmax" if r.container.own else "a softmax"
    found = [f"{key} {p[key]} does not go with slots, which have {gates} of their own: use {_neutral(key)}." for key in wrong]
    if r.container.own:
        return found
    if r.decay.reads == "key":
        found.append(
            f"decay {p['decay']} has one number per key channel, and container {p['container']} asks for one per slot or per head."
        )
    return found + recurrence_clashes(p, r)


def clashes_both_ways(name: str, p: dict[str, Any]) -> list[str]:
    """The same about a cell without a direction (bidirectional.py), which is one total sum or two scans."""
    r = rows_of(p)
    wrong = [key for key in ("write", "container", "cache") if p[key] != DEFAULTS[key]]
    wrong += ["position"] if r.position.phases else []
    wrong += ["decay"] if r.decay.module is not None and (r.decay.vector or r.decay.reads != "hidden") else []
    return [f"mixer {name!r}: {key} {p[key]} has a direction, and the model's attention has none: use {_neutral(key)}." for key in wrong]


def _neutral(key: str) -> str:
    return "position keep or drop" if key == "position" else f"{key} {DEFAULTS[key]}"
