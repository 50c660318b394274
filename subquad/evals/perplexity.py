"""Perplexity = exp(mean over predicted tokens of -ln p(token | tokens before it in its block)), the same tokens for every model.

Cost: windows x context tokens forward for each model (2 CPU cores, 135M parameters: about 750 tokens/s).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.evals.logits import token_nll
from subquad.evals.models import Models, measuring
from subquad.evals.paired import difference, stderr
from subquad.evals.rows import Row, row
from subquad.evals.text import blocks, describe, whole


def perplexity(models: Models, tokens: Tensor, *, context: int = 2048, windows: int | None = 8, stride: int | None = None) -> list[Row]:
    """Metric perplexity (no unit): over the first `windows` blocks of `context` tokens (None: all that fit).

    A block's first token is not predicted. stride < context: blocks overlap, and each token counts once, with at least context - stride
    tokens before it (but for the first block). tokens: [N] ids. UserError when the text is too short.
    """
    cut = blocks("perplexity", tokens, context, windows, stride)
    nll: dict[str, list[Tensor]] = {}
    for name, opener in models.items():
        with measuring(opener) as model:
            nll[name] = [token_nll(model, block.ids, block.scored) for block in cut]
    return perplexity_rows("perplexity", describe(cut, stride), nll)


def by_position(models: Models, tokens: Tensor, *, context: int = 2048, windows: int | None = 8, buckets: int = 6) -> list[Row]:
    """Metric perplexity_by_position (no unit): perplexity of the tokens in each range of positions, over the same blocks.

    Ranges double: with context 2048 and 6 buckets, positions 1-63, 64-127, 128-255, ..., 1024-2047 (position 0 is not predicted). A model
    that uses its whole context gets better to the end; one with a window levels off where the window ends.
    """
    cut = blocks("by_position", tokens, context, windows)
    edges = _edges(context, buckets)
    nll: dict[str, Tensor] = {}
    for name, opener in models.items():
        with measuring(opener) as model:
            nll[name] = torch.stack([token_nll(model, block.ids) for block in cut])
    return [
        one
        for start, stop in edges
        for one in perplexity_rows(
            "perplexity_by_position", f"positions {start}-{stop - 1} of {describe(cut)}",
            {name: list(nll_WC[:, start - 1 : stop - 1]) for name, nll_WC in nll.items()},
        )
    ]  # fmt: skip


def perplexity_rows(metric: str, setting: str, nll: Mapping[str, Sequence[Tensor]]) -> list[Row]:
    """exp of the mean, in fp64, of each model's -ln p by passage; the first model is the reference.

    Standard errors are over passages, whose tokens are not independent (delta method): `stderr` of the value, which is mostly how passages
    differ, and `ratio_stderr` of the ratio to the reference on the same passages. None for a single passage.
    """
    means = {name: [part.double().mean().item() for part in parts] for name, parts in nll.items()}
    reference, rows = next(iter(means.values()), []), []
    for name, parts in nll.items():
        log_value, log_error = torch.cat(list(parts)).double().mean().item(), stderr(means[name])
        log_ratio, ratio_error = difference(means[name], reference)
        more: dict[str, Any] = {"n": len(parts), "stderr": None if log_error is None else _exp(log_value) * log_error}
        if means[name] is not reference:
            more["ratio_stderr"] = None if ratio_error is None else _exp(log_ratio) * ratio_error
        rows.append(row(name, metric, setting, _exp(log_value), **more))
    return rows


def _exp(value: float) -> float:
    """Infinite, not an error, for a model that has diverged."""
    return math.exp(value) if value < 700 else math.inf


def _edges(context: int, buckets: int) -> list[tuple[int, int]]:
    """[start, stop) of each range of positions, the last half of the context last."""
    whole("by_position.buckets", buckets, least=1)
    if context >> (buckets - 1) < 2:
        most = context.bit_length() - 1
        raise UserError(f"by_position.buckets: a context of {context} can be halved into {most} ranges at most, got {buckets}.")
    stops = [context >> halvings for halvings in reversed(range(buckets))]
    return list(zip([1, *stops], stops, strict=False))
