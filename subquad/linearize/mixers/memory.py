"""What a cell remembers, as named parts: their sizes, and how they become the one tensor of a layer's state.

Key: B batch, G key/value heads, K key size, V value size, F features, M slots, P partitions.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.feature_maps import features_of
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.knobs import map_options, rows_of
from subquad.linearize.mixers.sparse_cache import cache_parts
from subquad.linearize.mixers.writes import WRITE_GATES

# Parts that start at the log of nothing; all others start at 0.
LOGS = ("top", "log_sum", "cache_score")


def base_features(shape: HeadShape, pieces: dict[str, Any]) -> int:
    """Features of the map itself; slots stand in their place."""
    row = rows_of(pieces).container
    return pieces[row.number] if row.slots else features_of(pieces["feature_map"], shape.key, map_options(pieces))


def state_features(shape: HeadShape, pieces: dict[str, Any]) -> int:
    """Rows of the state: the map's features, twice with a phase per feature, times the partitions."""
    rows = rows_of(pieces)
    return base_features(shape, pieces) * (1 + rows.position.doubles) * (pieces[rows.container.number] if rows.container.times else 1)


def has_total(pieces: dict[str, Any]) -> bool:
    """A column for q.z beside the values (SEEDS 3.1, augmentation)."""
    rows = rows_of(pieces)
    return not rows.write.corrects and (rows.normaliser.divides or rows.normaliser.counts or rows.combine.joint)


def part_shapes(shape: HeadShape, pieces: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> size per sequence, fp32."""
    rows, G = rows_of(pieces), shape.kv_heads
    columns = shape.value + has_total(pieces) + bool(rows.key_weight.column)
    parts = rows.container.parts(shape, pieces, (G, state_features(shape, pieces) + rows.normaliser.counts, columns))
    parts |= dict.fromkeys(rows.write.more, parts["sums"])
    if "k" in rows.feature_map.exponential and not rows.container.slots:
        parts["top"] = (G,)
    if rows.key_weight.rule is not None:
        parts |= rows.key_weight.rule.parts(G, base_features(shape, pieces))
    if rows.position.phases:
        parts["phase"] = (G, base_features(shape, pieces) // rows.position.phases)
    return parts | cache_parts(shape, pieces["cache"], sum(kept_sizes(shape, pieces).values()))


def kept_sizes(shape: HeadShape, pieces: dict[str, Any]) -> dict[str, int]:
    """Name -> numbers per key/value head that stay with a token until it is written, in the order in which they are packed."""
    rows, features = rows_of(pieces), base_features(shape, pieces)
    decay = features if rows.decay.vector else 1
    sizes = {name: WRITE_GATES[name].size(shape) for name in rows.write.gates}
    sizes |= {"decay": decay} if rows.decay.kept else {}
    sizes |= {"strength": decay} if rows.write.strength is not None else {}
    sizes |= dict.fromkeys(rows.key_weight.kept, 1)
    sizes |= {"phase": features // rows.position.phases} if rows.position.phases else {}
    sizes |= {rows.container.kept: pieces[rows.container.number]} if rows.container.kept else {}
    sizes |= {"plain": shape.key} if rows.position.plain else {}
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
