"""Decode: tokens per second with a cache of a given length, and the bytes that cache holds; throughput: that and prefill. Batch 1.

Models take turns at every step (A B A B ...), so that whatever else the machine does hits all of them alike; medians leave out the worst.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from subquad.errors import UserError
from subquad.evals.fill import CHUNK, FILLS, Fill
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


def throughput(
    models: Models,
    tokens: Tensor,
    *,
    cache_bytes: Callable[[Cache], int],
    contexts: int | Sequence[int] = (1024, 4096, 16384, 65536, 131072),
    prefill: int = 4096,
    new_tokens: int = 16,
    fill: str | Fill = "auto",
) -> list[Row]:
    """`decode` at each of `contexts`, and in the same run prefill_tokens_per_second, first_token_seconds (all tokens from an empty cache, then one
    token chosen) and peak_bytes (the most memory a prefill took beyond the loaded model) at those of at most `prefill` tokens, where every
    token really runs; and crossover_tokens: where a model's decoding becomes faster than the first model's, between two of `contexts` by
    interpolation of step times over the logarithm of the length. A model that is never faster has no such row.

    peak_bytes is allocated memory on an accelerator, resident memory of this process on Linux, and left out elsewhere.
    """
    lengths = sorted(wholes("throughput.contexts", contexts, least=1))
    whole("throughput.prefill", prefill, least=1)
    rows = decode(models, tokens, cache_bytes=cache_bytes, contexts=lengths, new_tokens=new_tokens, fill=fill)
    if not models:
        return []
    for context in (length for length in lengths if length <= prefill):
        ids_1T = tokens.repeat(-(-context // len(tokens)))[None, :context]
        threads = torch.get_num_threads()
        setting = f"{context} tokens, {threads} thread{'s' * (threads != 1)}"
        for name, opener in models.items():
            with measuring(opener) as model:
                seconds, peak = _prefill(model, ids_1T.to(model.device))
            rows.append(row(name, "prefill_tokens_per_second", setting, context / seconds, length=context))
            rows.append(row(name, "first_token_seconds", setting, seconds, length=context))
            rows += [row(name, "peak_bytes", setting, float(peak), length=context)] if peak is not None else []
    return rows + _crossovers(rows, list(models), lengths)


def _prefill(model: PreTrainedModel, ids_1T: Tensor) -> tuple[float, int | None]:
    """(seconds from an empty cache to the first chosen token, bytes the process or the device took more at its peak)."""
    model(input_ids=ids_1T[:, :8], use_cache=False)
    peak = PeakMemory(model.device)
    _finish(model)
    start = time.perf_counter()
    cache = DynamicCache(config=model.config)
    for part in ids_1T.split(CHUNK, dim=1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[0, -1].argmax(-1)
    _finish(model)
    return time.perf_counter() - start, peak.bytes()


class PeakMemory:
    """Bytes above what was in use when it was made."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif device.type == "cpu" and _STATUS.is_file():
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux, proc(5))
                self.before = _resident("VmRSS")
            except OSError:
                self.before = None

    def bytes(self) -> int | None:
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return max(0, peak - self.before)


_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _crossovers(rows: list[Row], names: list[str], lengths: list[int]) -> list[Row]:
    rates = {name: [r["value"] for r in rows if r["model"] == name and r["metric"] == "decode_tokens_per_second"] for name in names}
    found = []
    for name in names[1:]:
        gaps = [1 / rates[names[0]][i] - 1 / rates[name][i] for i in range(len(lengths))]  # seconds a step saves
        at = crossover(lengths, gaps)
        if at is not None:
            found.append(row(name, "crossover_tokens", f"decode, {lengths[0]} to {lengths[-1]} tokens", at))
    return found


def crossover(lengths: Sequence[int], saved: Sequence[float]) -> float | None:
    """The length from which on `saved` stays positive, interpolated over log length; the first length if it always is, None if it is not at
    the last one."""
    if saved[-1] <= 0:
        return None
    last = max((i for i, value in enumerate(saved) if value <= 0), default=None)
    if last is None:
        return float(lengths[0])
    share = -saved[last] / (saved[last + 1] - saved[last])
    return math.exp(math.log(lengths[last]) * (1 - share) + math.log(lengths[last + 1]) * share)


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
