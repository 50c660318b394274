"""What `subquad mixers` prints: presets as plain values."""

from typing import Any

from subquad.linearize.mixers import MIXERS, causal, mixer_class
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.cell import DEFAULTS
from subquad.linearize.mixers.combine import COMBINES
from subquad.linearize.mixers.decays import DECAYS
from subquad.linearize.mixers.feature_maps import FEATURE_MAPS
from subquad.linearize.mixers.normalisers import NORMALISERS
from subquad.linearize.mixers.outputs import OUTPUTS
from subquad.linearize.mixers.positions import POSITIONS
from subquad.linearize.mixers.writes import WRITES
from subquad.registry import check_name

CONTAINERS = {
    "plain": "one state per key/value head",
    "gated_slots": "slots: K~ = f K~ + (1 - f) k, V~ likewise, read by softmax(K~ q)",
    "softmax_slots": "slots: K~, V~ averages of k, v weighted by e^(W x), read by softmax(K~ q)",
    "levels": "levels: sum_l lambda_l q.S_l over blocks of 1, 1, 2, 4, .. tokens, lambda = softplus(W x)",
    "partitions": "partitions: sum_p e_p S_p^T q, e the largest of softmax(W x)",
}


def rows() -> list[dict[str, Any]]:
    """One dict per preset: name, seeds, about, paper, directions, memory (constant, or it grows with the text), needs, exact."""
    found = []
    for name, preset in MIXERS.items():
        row = {"name": name, "seeds": preset.seeds.split(), "about": preset.about, "paper": preset.paper}
        row |= {"directions": list(preset.directions), "memory": "constant" if constant(name) else "grows"}
        found.append(row | {"needs": preset.needs, "exact": preset.exact})
    return found


def constant(name: str) -> bool:
    """What the mixer remembers does not grow with the text: it can keep to a budget of key/value bytes."""
    return mixer_class(name).kept_tokens(10**9, 64, 4, **MIXERS[name].pieces)[0] <= 64


def describe(name: str) -> dict[str, Any]:
    """One preset with its pieces and formula. Raises UserError for unknown names, with the nearest."""
    check_name("mixer", name, MIXERS)
    row = next(r for r in rows() if r["name"] == name)
    preset = MIXERS[name]
    return row | {"class": preset.uses, "pieces": preset.pieces, "formula": formula(name)}


def formula(name: str) -> list[str]:
    """Lines that say what the preset computes, piece by piece."""
    preset = MIXERS[name]
    if preset.uses != "cell":
        return [line.strip() for line in (mixer_class(name).__doc__ or preset.about).splitlines() if line.strip()]
    p = {**DEFAULTS, **preset.pieces}
    lines = [f"combine    {p['combine']}: {COMBINES[p['combine']].about}"]
    if p["container"] != "plain":
        lines.append(f"container  {CONTAINERS[p['container']]}")
    if not p["container"].endswith("slots"):
        row = FEATURE_MAPS[p["feature_map"]]
        lines.append(f"features   phi = {p['feature_map']} ({row.source}); a weight of j for t is phi(q_t).phi(k_j)")
        lines.append(f"decay      {p['decay']}: {DECAYS[p['decay']].about}")
        lines.append(f"write      {p['write']}: S <- a S + {WRITES[p['write']].about}")
        bare = WRITES[p["write"]].corrects or COMBINES[p["combine"]].joint
        lines.append("normaliser " + ("the combination's" if bare else f"{p['normaliser']}: {NORMALISERS[p['normaliser']].about}"))
        if p["key_weight"] != "none":
            lines.append(f"key weight {p['key_weight']}")
    lines.append(f"position   {p['position']}: {POSITIONS[p['position']].about}")
    if p["output"] != "none":
        lines.append(f"output     {p['output']}: {OUTPUTS[p['output']].about}")
    return lines


def state_bytes(name: str, shape: HeadShape) -> int:
    """Recurrent state of one layer of `shape`, bytes per sequence, window and sinks not counted."""
    return mixer_class(name).memory_bytes(shape, **MIXERS[name].pieces)


__all__ = ["causal", "constant", "describe", "formula", "rows", "state_bytes"]
