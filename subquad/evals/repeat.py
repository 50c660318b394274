"""Repeat: a passage twice in a row; perplexity on the second copy. Near 1 for a model that can look back and copy, else high.

This is recall at any distance, on any text, with no answer format: what a window of w < length alone cannot do (DESIGN section 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.evals.logits import token_nll
from subquad.evals.models import Models, measuring
from subquad.evals.perplexity import perplexity_rows
from subquad.evals.rows import Row
from subquad.evals.text import whole, wholes


def repeat(models: Models, tokens: Tensor, *, length: int | Sequence[int] = 512, samples: int = 4, seed: int = 0) -> list[Row]:
    """Metric repeat_perplexity (no unit), one row for each of `length` (tokens of one copy).

    `samples` passages start at places drawn with `seed`, the same for all models. exp of the mean -ln p over the second copies without
    their first token, which no model can know. tokens: [N] ids. Cost: 2 x length x samples tokens forward for each model.
    """
    lengths = wholes("repeat.length", length, least=2)
    whole("repeat.samples", samples, least=1)
    whole("repeat.seed", seed, least=0)
    longest = max(lengths)
    if longest > len(tokens):
        raise UserError(f"repeat needs {longest} tokens of text for one passage; the text has {len(tokens)}. Lower repeat.length.")
    passages = {size: _passages(tokens, size, samples, seed) for size in lengths}
    nll: dict[int, dict[str, list[Tensor]]] = {size: {} for size in lengths}
    for name, opener in models.items():
        with measuring(opener) as model:
            for size in lengths:
                nll[size][name] = [token_nll(model, torch.cat([passage, passage]), first=size + 1) for passage in passages[size]]
    return [one for size in lengths for one in perplexity_rows("repeat_perplexity", _setting(size, samples, seed), nll[size])]


def _passages(tokens: Tensor, length: int, samples: int, seed: int) -> list[Tensor]:
    starts = torch.randint(len(tokens) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return [tokens[start : start + length] for start in starts.tolist()]


def _setting(length: int, samples: int, seed: int) -> str:
    return f"{length} + {length} tokens, {samples} sample{'s' * (samples != 1)}, seed {seed}"
