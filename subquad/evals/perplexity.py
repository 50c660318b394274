"""Perplexity = exp(mean over predicted tokens of -ln p(token | tokens before it in its block)), the same tokens for every model.

Cost: windows x context tokens forward for each model (2 CPU cores, 135M parameters: about 750 tokens/s).
"""

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.evals.logits import token_nll
from subquad.evals.models import Models, measuring
from subquad.evals.rows import Row, row
from subquad.evals.text import blocks, describe, whole


def perplexity(models: Models, tokens: Tensor, *, context: int = 2048, windows: int | None = 8, stride: int | None = None) -> list[Row]:
    """Metric perplexity (no unit): over the first `windows` blocks of `context` tokens (None: all that fit).

    A block's first token is not predicted. stride < context: blocks overlap, and each token counts once, with at least context - stride
    tokens before it (but for the first block). tokens: [N] ids. UserError when the text is too short.
    """
    cut = blocks("perplexity", tokens, context, windows, stride)
    rows = []
    for name, opener in models.items():
        with measuring(opener) as model:
            nll = torch.cat([token_nll(model, block.ids, block.scored) for block in cut])
        rows.append(row(name, "perplexity", describe(cut, stride), exp_mean(nll)))
    return rows


def by_position(models: Models, tokens: Tensor, *, context: int = 2048, windows: int | None = 8, buckets: int = 6) -> list[Row]:
    """Metric perplexity_by_position (no unit): perplexity of the tokens in each range of positions, over the same blocks.

    Ranges double: with context 2048 and 6 buckets, positions 1-63, 64-127, 128-255, ..., 1024-2047 (position 0 is not predicted). A model
    that uses its whole context gets better to the end; one with a window levels off where the window ends.
    """
    cut = blocks("by_position", tokens, context, windows)
    edges = _edges(context, buckets)
    rows = []
    for name, opener in models.items():
        with measuring(opener) as model:
            nll_WC = torch.stack([token_nll(model, block.ids) for block in cut])
        for start, stop in edges:
            setting = f"positions {start}-{stop - 1} of {describe(cut)}"
            rows.append(row(name, "perplexity_by_position", setting, exp_mean(nll_WC[:, start - 1 : stop - 1])))
    return rows


def exp_mean(nll: Tensor) -> float:
    """exp of the mean, fp64."""
    return nll.double().mean().exp().item()


def _edges(context: int, buckets: int) -> list[tuple[int, int]]:
    """[start, stop) of each range of positions, the last half of the context last."""
    whole("by_position.buckets", buckets, least=1)
    if context >> (buckets - 1) < 2:
        most = context.bit_length() - 1
        raise UserError(f"by_position.buckets: a context of {context} can be halved into {most} ranges at most, got {buckets}.")
    stops = [context >> halvings for halvings in reversed(range(buckets))]
    return list(zip([1, *stops], stops, strict=False))
