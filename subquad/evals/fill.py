"""Ways to bring a cache to a length before decoding is timed. How long a step takes depends on the cache's size, not on what is in it.

A fill is `fill(model, cache, ids)`: afterwards the cache holds as much as a prefill of `ids` [B, T] would leave there. It is called under
inference_mode. Why not always prefill: 30 softmax layers of 9 heads of 64 spend 4e13 floating-point operations on 32k tokens in attention
alone (30 x 9 x 64 x 2 x 32768^2), which is many minutes on a CPU and grows with the square of the length.

Key: B batch, G heads, T tokens of the prompt, S tokens in the cache, K key size.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

Fill = Callable[[PreTrainedModel, Cache, Tensor], None]
Extend = Callable[[CacheLayerMixin, int], None]  # extend(layer, tokens): grow a layer that holds some tokens by as many more

CHUNK = 1024  # tokens of one prefill call
PROMPT = 512  # tokens that really run before layers are extended: longer than any window worth converting to, so that windows are full


def prefill(model: PreTrainedModel, cache: Cache, ids_BT: Tensor) -> None:
    """Run the base model over all of `ids`, CHUNK tokens at a time."""
    for part in ids_BT.split(CHUNK, dim=1):
        model.base_model(input_ids=part, past_key_values=cache, use_cache=True)


def repeat_tokens(layer: CacheLayerMixin, tokens: int) -> None:
    """Extend a stock layer [B, G, S, K] with keys and values it has already, in turn: right shapes, ordinary magnitudes."""
    places = torch.arange(tokens, device=layer.keys.device) % layer.keys.shape[-2]
    layer.update(layer.keys[:, :, places], layer.values[:, :, places])


STOCK: dict[type, Extend] = {DynamicLayer: repeat_tokens, DynamicSlidingWindowLayer: repeat_tokens}


def auto(model: PreTrainedModel, cache: Cache, ids_BT: Tensor, extend: Mapping[type, Extend] = STOCK) -> None:
    """Run PROMPT tokens, then extend the layers if `extend` knows the classes of all of them; otherwise run the rest as well.

    For other classes of cache layers: functools.partial(auto, extend={**STOCK, MyLayer: my_extend}).
    """
    prompt, rest = ids_BT[:, :PROMPT], ids_BT[:, PROMPT:]
    prefill(model, cache, prompt)
    used = [layer for layer in cache.layers if layer.is_initialized]  # layers that share another's keys stay empty
    if rest.shape[1] and used and all(type(layer) in extend for layer in used):
        for layer in used:
            extend[type(layer)](layer, rest.shape[1])
    elif rest.shape[1]:
        prefill(model, cache, rest)


FILLS = {"auto": "subquad.evals.fill:auto", "prefill": "subquad.evals.fill:prefill"}
