"""Containers: what holds the state of a head (SEEDS 3.2 K11). One row each; the arithmetic is in slots.py, levels.py, delta_levels.py and partitions.py.

Key: G key/value heads, F features, V value size, M slots, P partitions, L levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.levels import LEVELS, LevelWeights
from subquad.linearize.mixers.partitions import Routes
from subquad.linearize.mixers.slots import slot_gate
from subquad.linearize.mixers.writes import WRITES

Size = tuple[int, ...]


def one_state(shape: HeadShape, pieces: dict[str, Any], size: Size) -> dict[str, Size]:
    return {"sums": size}


def slot_states(shape: HeadShape, pieces: dict[str, Any], size: Size) -> dict[str, Size]:
    return {"sums": (shape.kv_heads, pieces["slots"], shape.key), "values": (shape.kv_heads, pieces["slots"], shape.value)}


def totalled_slots(shape: HeadShape, pieces: dict[str, Any], size: Size) -> dict[str, Size]:
    return slot_states(shape, pieces, size) | {"total": (shape.kv_heads, pieces["slots"])}


def written_slots(shape: HeadShape, pieces: dict[str, Any], size: Size) -> dict[str, Size]:
    """The delta rule holds keys and values as they are, sums are divided by their totals."""
    return (slot_states if WRITES[pieces["write"]].corrects else totalled_slots)(shape, pieces, size)


def written_slot_gate(shape: HeadShape, pieces: dict[str, Any]) -> nn.Module:
    """Biases cancel in averages; under the delta rule they would make all tokens write to the same slots."""
    return slot_gate(shape, pieces["slots"], 0.0 if WRITES[pieces["write"]].corrects else 6.0)


def own_slot_gate(shape: HeadShape, pieces: dict[str, Any]) -> nn.Module:
    return slot_gate(shape, pieces["slots"])


def routes(shape: HeadShape, pieces: dict[str, Any]) -> nn.Module:
    return Routes(shape, pieces["partitions"], pieces["top"])


def level_weights(shape: HeadShape, pieces: dict[str, Any]) -> nn.Module:
    return LevelWeights(shape)


def level_states(shape: HeadShape, pieces: dict[str, Any], size: Size) -> dict[str, Size]:
    return {"sums": (LEVELS, *size), "written": ()}


@dataclass(frozen=True)
class ContainerRow:
    about: str
    source: str
    parts: Callable[[HeadShape, dict, Size], dict[str, Size]] = one_state  # name -> size; given the size of a plain state, (G, F, columns)
    name: str = ""  # of the gate in the cell
    gate: Callable[[HeadShape, dict], nn.Module] | None = None  # built as gate(shape, pieces); of the layer input
    kept: str = ""  # the name under which the gate's numbers stay with a token until it is written
    takes: tuple[str, ...] = ()  # options that it reads besides the knobs; the first says how many they are
    reads: dict[str, str] = field(default_factory=dict)  # a write's read -> the row of READS in its place; empty: as it is
    slots: bool = False  # holds keys and values, not sums over features: no feature map or normaliser
    own: bool = False  # fades and writes by its own gate: no decay or write
    times: bool = False  # the state has `number` times the map's features

    @property
    def number(self) -> str:
        """The option that says how many they are."""
        return self.takes[0] if self.takes else ""


CONTAINERS = {
    "plain": ContainerRow("one state per key/value head", "SEEDS 3.1"),
    "gated_slots": ContainerRow(
        "slots: K~ = f K~ + (1 - f) k, V~ likewise, read by softmax(K~ q)", "SEEDS B02", slot_states, "slot",
        own_slot_gate, kept="slot", takes=("slots",), reads={"additive": "gated_slots"}, slots=True, own=True,
    ),
    "softmax_slots": ContainerRow(
        "slots: K~, V~ averages of k, v weighted by e^(W x), read by softmax(K~ q)", "SEEDS Dependencies, ABC", totalled_slots, "slot",
        own_slot_gate, kept="slot", takes=("slots",), reads={"additive": "softmax_slots"}, slots=True, own=True,
    ),
    "slots": ContainerRow(
        "slots: K~, V~ states of the write with e^(W x) in the place of phi(k), read by softmax(K~ q)", "SEEDS K11", written_slots, "slot",
        written_slot_gate, kept="slot", takes=("slots",), reads={"additive": "slots", "delta": "delta_slots"}, slots=True,
    ),
    "partitions": ContainerRow(
        "partitions: sum_p e_p S_p^T q, e the largest of softmax(W x)", "SEEDS B08", one_state, "routes",
        routes, kept="route", takes=("partitions", "top"), times=True,
    ),
    "levels": ContainerRow(
        "levels: sum_l lambda_l q.S_l over blocks of 1, 1, 2, 4, .. tokens, S_l a state of the write, lambda = softplus(W x)", "SEEDS B06", level_states, "levels",
        level_weights, reads={"additive": "levels", "delta": "delta_levels"},
    ),
}  # fmt: skip
