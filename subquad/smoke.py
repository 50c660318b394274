"""`--smoke`: the whole recipe on a shrunken copy of the user's own model, in under a minute. Every step really runs."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from subquad.linearize.mixers.describe import constant
from subquad.recipe import Recipe
from subquad.settings import validate

LAYERS = 2
CHARACTERS = 200_000  # of text, enough for every capped setting below
# Upper bounds by key, wherever the key stands in select, stages, evals and sample. Tokens, except windows, samples, batch (counts).
CAPS = {
    "tokens": 384,
    "context": 128,
    "length": 64,
    "contexts": 256,
    "lengths": 512,  # the shortest text of every recall task fits, even at a token a byte
    "new_tokens": 8,
    "windows": 2,
    "samples": 1,
    "batch": 1,
}
CAPS |= {"stride": 128, "buckets": 4, "repeats": 1}


def shrink_model(model: PreTrainedModel) -> PreTrainedModel:
    """The first two layers of `model` with its own embeddings, norms and head, as a model of the same class. No family is named."""
    config = shrink_config(model.config)
    small = type(model)(config).to(model.dtype).eval()
    small.load_state_dict(model.state_dict(), strict=False)  # the rest of the layers has no place to go
    small.generation_config = model.generation_config
    return small


def shrink_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with two layers; every per-layer list in it is cut to match."""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    small.num_hidden_layers = min(LAYERS, layers)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(small, name, value[:LAYERS])
    return small


def shrink_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with every length and count capped, and without the layers that the shrunken model lacks.

    Where that leaves nothing to convert, every layer of the shrunken model is converted. A budget that only checks a hand-made choice is left out:
    its share is one of all layers; so are selection and budget where no choice of heads can meet it.
    """
    data = recipe.to_dict()
    data["name"] += "-smoke"
    for part in ("select", "stages", "evals", "sample"):
        data[part] = _capped(data[part])
    data["plan"]["layers"] = _within(data["plan"]["layers"]) or None
    layers = data["plan"]["layers"] or range(LAYERS)
    data["plan"]["exact"] = _sparing(layers, _within(data["plan"]["exact"]))
    if data["select"]:
        data["select"]["heads"] = _sparing(layers, _within(data["select"]["heads"]))
    if no_budget(recipe):
        data["select"] = data["budget"] = None
    elif not recipe.select or recipe.select.method == "list":
        data["budget"] = None
    return validate(Recipe, data)


def no_budget(recipe: Recipe) -> str:
    """Why a smoke run goes without the recipe's selection and budget; nothing if it has them."""
    if not (recipe.select and recipe.budget) or constant(recipe.plan.mixer):
        return ""
    return (
        f"{recipe.plan.mixer} keeps all keys and values, so that no budget of their bytes can be met: this smoke run goes without select and budget. "
        "The whole recipe runs with --set select=null --set budget=null."
    )


def shrink_texts(texts: list[Any]) -> list[Any]:
    """The first documents, up to CHARACTERS in all."""
    kept, total = [], 0
    for document in texts:
        if total < CHARACTERS:
            kept.append(type(document)(document.name, document.text[: CHARACTERS - total]))
            total += len(kept[-1].text)
    return kept


def _capped(node: Any, cap: int | None = None) -> Any:
    if isinstance(node, dict):
        return {key: _capped(value, CAPS.get(key)) for key, value in node.items()}
    if isinstance(node, list):
        return list({repr(item): item for item in (_capped(item, cap) for item in node)}.values())  # capped values are equal: keep one
    return min(node, cap) if cap is not None and isinstance(node, int) and not isinstance(node, bool) else node


def _sparing(layers: Sequence[int], exact: Any) -> Any:
    """`exact`, or nothing of it where it keeps all of `layers` whole."""
    return [] if isinstance(exact, list) and all(layer in exact for layer in layers) else exact


def _within(heads: Any) -> Any:
    """Whole layers, {layer: [kv heads]} or a list of both, without layers past the last one kept."""
    if isinstance(heads, dict):
        return {layer: which for layer, which in heads.items() if int(layer) < LAYERS}
    return heads and [_within(entry) if isinstance(entry, dict) else entry for entry in heads if isinstance(entry, dict) or entry < LAYERS]
