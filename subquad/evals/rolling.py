"""Perplexity of whole documents per word and per byte: comparable between tokenizers, as lm-evaluation-harness reports WikiText."""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from subquad.errors import raise_all
from subquad.evals.answers import Answers
from subquad.evals.local import find, read_text, stem
from subquad.evals.models import Models
from subquad.evals.requests import prefix_token, rolling_requests, score_all
from subquad.evals.rows import Row, row
from subquad.evals.text import whole


def rolling(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    files: str | Sequence[str] = (),
    context: int = 2048,
    characters: int | None = None,
) -> list[Row]:
    """Metrics word_perplexity and bits_per_byte of text files, each one document (its first `characters`, None: all).

    exp(-ln p / words), words being what whitespace separates, and -log2 p / bytes. Every token counts once: the first window of `context` tokens
    starts with the prefix token, each later one predicts up to `context` new tokens given at least the one before. UserError for a file without text.
    """
    whole("rolling.context", context, least=2)
    if characters is not None:
        whole("rolling.characters", characters, least=1)
    documents = {path: read_text(path)[:characters] for path in find("rolling", files)}
    raise_all([f"{path} holds no text." for path, text in documents.items() if not text.strip()])
    if not models:
        return []
    rows = []
    for path, text in documents.items():
        requests = rolling_requests(tokenizer.encode(text), prefix_token(tokenizer), context)
        found = score_all(models, requests, answers, batch_tokens=context)
        words, size = len(re.split(r"\s+", text)), len(text.encode())
        setting = f"{stem(path)}, {words} words, context {context}"
        for name, scored in found.items():
            total = -math.fsum(spans[0].logprob for spans in scored)
            rows.append(row(name, "word_perplexity", setting, _exp(total / words), task=stem(path), n=words))
            rows.append(row(name, "bits_per_byte", setting, total / math.log(2) / size, task=stem(path), n=size))
    return rows


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
