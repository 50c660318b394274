"""What `subquad mixers` prints: presets as plain values."""

from typing import Any

from subquad.linearize.mixers import MIXERS, causal, mixer_class
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.knobs import DEFAULTS, rows_of
from subquad.registry import check_name


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
    r = rows_of(p)
    lines = [f"combine    {p['combine']}: {r.combine.about}"]
    if p["cache"]:
        lines.append(f"cache      {p['cache']} pairs per key/value head that the sums recall worst stay exact, under one softmax with window and sinks")
    if p["container"] != "plain":
        lines.append(f"container  {r.container.about}")
    if not r.container.slots:
        lines.append(f"features   phi = {p['feature_map']} ({r.feature_map.source}); a weight of j for t is phi(q_t).phi(k_j)")
    if not r.container.own:
        lines.append(f"decay      {p['decay']}: {r.decay.about}")
        lines.append(f"write      {p['write']}: S <- a S + {r.write.about}")
    if not r.container.slots:
        bare = r.write.corrects or r.combine.joint
        lines.append("normaliser " + ("the combination's" if bare else f"{p['normaliser']}: {r.normaliser.about}"))
        if r.key_weight.rule is not None:
            lines.append(f"key weight {p['key_weight']}: {r.key_weight.about}")
    lines.append(f"position   {p['position']}: {r.position.about}")
    if p["output"] != "none":
        lines.append(f"output     {p['output']}: {r.output.about}")
    return lines


def state_bytes(name: str, shape: HeadShape) -> int:
    """Recurrent state of one layer of `shape`, bytes per sequence, window and sinks not counted."""
    return mixer_class(name).memory_bytes(shape, **MIXERS[name].pieces)


__all__ = ["causal", "constant", "describe", "formula", "rows", "state_bytes"]
