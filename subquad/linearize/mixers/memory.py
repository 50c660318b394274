"""What a cell remembers, as named parts: their sizes, and how they become the one tensor of a layer's state.

Key: B batch, G key/value heads, K key size, V value size, F features, M slots, P partitions.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.combine import COMBINES
from subquad.linearize.mixers.decays import DECAYS
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS, features_of
from subquad.linearize.mixers.key_weights import KEPT, KEY_WEIGHTS, NOTHING
from subquad.linearize.mixers.levels import LEVELS
from subquad.linearize.mixers.normalisers import NORMALISERS
from subquad.linearize.mixers.positions import POSITIONS
from subquad.linearize.mixers.writes import WRITES

# Parts that start at the log of nothing; all others start at 0.
LOGS = ("top", "log_sum")


def base_features(shape: HeadShape, pieces: dict[str, Any]) -> int:
    """Features of the map itself."""
    return features_of(pieces["feature_map"], shape.key, dict(features=pieces["features"], horizon=pieces["horizon"]))


def state_features(shape: HeadShape, pieces: dict[str, Any]) -> int:
    """Rows of the state: the map's features, twice with a phase per feature, times the partitions."""
    twice = 2 if POSITIONS[pieces["position"]].doubles else 1
    return base_features(shape, pieces) * twice * (pieces["partitions"] if pieces["container"] == "partitions" else 1)


def has_total(pieces: dict[str, Any]) -> bool:
    """A column for q.z beside the values (SEEDS 3.1, augmentation)."""
    row = NORMALISERS[pieces["normaliser"]]
    return not WRITES[pieces["write"]].corrects and (row.divides or row.counts or COMBINES[pieces["combine"]].joint)


def part_shapes(shape: HeadShape, pieces: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> size per sequence, fp32."""
    G, K, V = shape.kv_heads, shape.key, shape.value
    if pieces["container"].endswith("slots"):
        M = pieces["slots"]
        parts = {"sums": (G, M, K), "values": (G, M, V)}
        return parts | ({"total": (G, M)} if pieces["container"] == "softmax_slots" else {})
    if pieces["container"] == "levels":
        return {"sums": (LEVELS, G, state_features(shape, pieces), V + has_total(pieces)), "written": ()}
    rows = state_features(shape, pieces) + NORMALISERS[pieces["normaliser"]].counts
    parts = {"sums": (G, rows, V + has_total(pieces) + ("outgoing" in KEPT[pieces["key_weight"]]))}
    if pieces["write"] == "momentum":
        parts["momentum"] = parts["sums"]
    if "k" in FEATURE_MAPS[pieces["feature_map"]].exponential:
        parts["top"] = (G,)
    weigh = KEY_WEIGHTS[pieces["key_weight"]]
    if weigh is not None:
        parts |= weigh.parts(G, base_features(shape, pieces))
    phases = POSITIONS[pieces["position"]].phases
    if phases:
        parts["phase"] = (G, base_features(shape, pieces) // phases)
    return parts


def kept_sizes(shape: HeadShape, pieces: dict[str, Any]) -> dict[str, int]:
    """Name -> numbers per key/value head that stay with a token until it is written, in the order in which they are packed."""
    features, decay, phases = base_features(shape, pieces), DECAYS[pieces["decay"]], POSITIONS[pieces["position"]].phases
    sizes = {}
    if WRITES[pieces["write"]].corrects:
        sizes["beta"] = 1
    if pieces["write"] == "momentum":
        sizes["eta"] = 1
    if pieces["write"] == "selective":
        sizes["dt"] = shape.value
    if decay.module is not None and decay.clock == "own" and decay.reads == "hidden":
        sizes["decay"] = features if decay.vector else 1
    if pieces["write"] in ("step", "dual"):
        sizes["strength"] = features if decay.vector else 1
    if pieces["container"].endswith("slots"):
        sizes["slot"] = pieces["slots"]
    sizes |= KEPT[pieces["key_weight"]]
    if phases:
        sizes["phase"] = features // phases
    if pieces["container"] == "partitions":
        sizes["route"] = pieces["partitions"]
    if POSITIONS[pieces["position"]].plain:
        sizes["plain"] = shape.key
    return sizes


def open_parts(packed: Tensor | None, shapes: dict[str, tuple[int, ...]], like: Tensor) -> dict[str, Tensor]:
    """Name -> [B, *size] fp32. One part is the state's tensor itself; several are laid end to end in it."""
    B = like.shape[0]
    if packed is None:
        return {name: like.new_full((B, *size), NOTHING if name in LOGS else 0.0, dtype=torch.float32) for name, size in shapes.items()}
    if len(shapes) == 1:
        return {next(iter(shapes)): packed}
    lengths = [torch.Size(size).numel() for size in shapes.values()]
    return {name: x.view(B, *size) for (name, size), x in zip(shapes.items(), packed.split(lengths, 1), strict=True)}


def close_parts(parts: dict[str, Tensor]) -> Tensor:
    if len(parts) == 1:
        return next(iter(parts.values()))
    return torch.cat([x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in parts.values()], 1)
