"""Decode: tokens per second with a cache of a given length, and the bytes that cache holds. Batch 1.

Models take turns at every step (A B A B ...), so that whatever else the machine does hits all of them alike; medians leave out the worst.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from subquad.errors import UserError
from subquad.evals.fill import FILLS, Fill
from subquad.evals.models import Models, measuring
from subquad.evals.rows import Row, row
from subquad.evals.text import whole, wholes
from subquad.registry import lookup

WARM_UP = 2  # steps that are not counted: the first ones allocate


def decode(
    models: Models,
    tokens: Tensor,
    *,
    cache_bytes: Callable[[Cache], int],
    contexts: int | Sequence[int] = (1024, 8192),
    new_tokens: int = 32,
    fill: str | Fill = "auto",
) -> list[Row]:
    """Metrics decode_tokens_per_second (1 / median seconds of a step: one token forward and argmax) and state_bytes (bytes), for each of
    `contexts`, the tokens in the cache before the first step.

    cache_bytes: measures a transformers Cache. new_tokens: timed steps. fill: 'auto' (stock layers are extended without running the model),
    'prefill' (every token really runs; quadratic for a softmax teacher), or a function, see fill.py. tokens: [N] ids to feed, repeated as
    often as needed. All models' caches of one length are in memory together. torch's thread count is used as it is; the setting names it.
    """
    lengths = wholes("decode.contexts", contexts, least=1)
    whole("decode.new_tokens", new_tokens, least=1)
    filler = lookup("decode.fill", fill, FILLS) if isinstance(fill, str) else fill
    if not callable(filler):
        raise UserError(f"decode.fill: expected one of {', '.join(FILLS)}, got {fill!r}.")
    if not len(tokens):
        raise UserError("decode needs at least 1 token of text; the text has 0.")
    return [found for context in lengths for found in _at(models, tokens, context, new_tokens, filler, cache_bytes)]


def _at(models: Models, tokens: Tensor, context: int, new_tokens: int, fill: Fill, cache_bytes: Callable[[Cache], int]) -> list[Row]:
    """Rows of all models with `context` tokens in the cache."""
    ids_1T = tokens.repeat(-(-(context + WARM_UP + new_tokens) // len(tokens)))[None]
    prompt, fed = ids_1T[:, :context], ids_1T[:, context : context + WARM_UP + new_tokens]
    caches = {name: _filled(opener, prompt, fill) for name, opener in models.items()}
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in fed.split(1, dim=1):
        for name, opener in models.items():
            with measuring(opener) as model:
                seconds[name].append(_seconds(model, caches[name], step.to(model.device)))
    threads = torch.get_num_threads()
    setting = f"{context} tokens, {new_tokens} steps, {threads} thread{'s' * (threads != 1)}"
    rates = {name: 1 / statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    rows = [row(name, "decode_tokens_per_second", setting, rates[name]) for name in models]
    return rows + [row(name, "state_bytes", f"{context} tokens", float(held[name])) for name in models]


def _filled(opener: Callable, prompt_1T: Tensor, fill: Fill) -> Cache:
    with measuring(opener) as model:
        cache = DynamicCache(config=model.config)
        fill(model, cache, prompt_1T.to(model.device))
        wanted, got = prompt_1T.shape[1], cache.get_seq_length()
        assert got == wanted, f"fill left {got} tokens in the cache, not {wanted}"
    return cache


def _seconds(model: PreTrainedModel, cache: Cache, id_11: Tensor) -> float:
    """Seconds of one step, which the cache remembers."""
    _finish(model)
    start = time.perf_counter()
    model(input_ids=id_11, past_key_values=cache, use_cache=True).logits.argmax(-1)
    _finish(model)
    return time.perf_counter() - start


def _finish(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
