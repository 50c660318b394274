"""Token-level recall tasks for models trained from scratch: no words, no tokenizer, so that a mixer is judged before any conversion (SEEDS H05).

A task is `task(generator, batch, *, settings) -> Batch`. Token 0 is the blank, token 1 the mark that asks for an answer; the rest are letters.
Positions without a label are not trained and not scored.

Key: B batch, T tokens.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from subquad.errors import UserError, raise_all
from subquad.evals.text import whole
from subquad.registry import lookup, unknown_settings

BLANK, MARK, FIRST = 0, 1, 2  # FIRST: the first letter
NO_LABEL = -100  # what torch's cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """ids [B, T] int64; labels [B, T]: the token a model should put first at this position, or NO_LABEL; distance [B, T]: tokens between the
    position and the place that holds the answer (0 where nothing is asked); chance: accuracy of a guess among all possible answers."""

    ids: Tensor
    labels: Tensor
    distance: Tensor
    chance: float


def mqar(generator: Generator, batch: int, *, pairs: int = 16, queries: int = 16, gap: int = 16, letters: int = 128) -> Batch:
    """Multi-query associative recall (Zoology): `pairs` key-value pairs, `gap` blanks, then `queries` keys; the label of each is its value.

    Keys and values are two halves of the letters; keys of a sequence differ, and none is asked twice unless queries > pairs (answers are not
    written into the sequence, so asking again gives nothing away). 2 pairs + gap + queries + 1 tokens. Chance 2 / letters.
    """
    half = letters // 2
    _at_most("mqar.pairs", pairs, half, "half of mqar.letters, so that keys differ")
    keys = FIRST + _choices(generator, batch, half, pairs)
    values = FIRST + half + torch.randint(half, (batch, pairs), generator=generator)
    asked = _choices(generator, batch, pairs, queries) if queries <= pairs else torch.randint(pairs, (batch, queries), generator=generator)
    start = 1 + 2 * pairs + gap
    ids = torch.full((batch, start + queries), BLANK)
    ids[:, 0] = MARK
    ids[:, 1 : 1 + 2 * pairs : 2], ids[:, 2 : 2 + 2 * pairs : 2] = keys, values
    ids[:, start:] = keys.gather(1, asked)
    labels, distance = torch.full_like(ids, NO_LABEL), torch.zeros_like(ids)
    labels[:, start:] = values.gather(1, asked)
    distance[:, start:] = start + torch.arange(queries) - (2 + 2 * asked)
    return Batch(ids, labels, distance, 1 / half)


def copying(generator: Generator, batch: int, *, length: int = 24, gap: int = 16, letters: int = 32) -> Batch:
    """`length` letters, `gap` blanks, a mark, then the same letters again. 2 length + gap + 1 tokens. Chance 1 / letters."""
    return _copied(generator, batch, length, gap, letters, noise=0)


def selective_copying(generator: Generator, batch: int, *, length: int = 12, noise: int = 24, gap: int = 16, letters: int = 32) -> Batch:
    """As copying, with `noise` blanks at random places among the letters, which are to be left out. Chance 1 / letters."""
    return _copied(generator, batch, length, gap, letters, noise)


def induction(generator: Generator, batch: int, *, distance: int = 32, letters: int = 64, questions: int = 8) -> Batch:
    """Induction at one distance: random letters; at each of `questions` places a pair seen exactly `distance` tokens before starts again, and
    the label is how it went on. A pair's first letter occurs nowhere else. Chance 1 / (letters - questions)."""
    _at_most("induction.questions", questions, letters // 2, "half of induction.letters")
    _at_most("induction.questions", 2 * questions, distance, "half of induction.distance, so that pairs do not overlap")
    triggers = FIRST + _choices(generator, batch, letters, letters)  # a random order of all letters; the first `questions` are triggers
    plain = torch.randint(questions, letters, (batch, 2 * distance), generator=generator)
    ids = torch.cat([torch.full((batch, 1), MARK), triggers.gather(1, plain)], 1)
    places = 1 + 2 * _choices(generator, batch, distance // 2, questions)  # [B, Q]: where the trigger stands first
    ids.scatter_(1, places, triggers[:, :questions]).scatter_(1, places + distance, triggers[:, :questions])
    labels, far = torch.full_like(ids, NO_LABEL), torch.zeros_like(ids)
    labels.scatter_(1, places + distance, ids.gather(1, places + 1))
    far.scatter_(1, places + distance, torch.full_like(places, distance - 1))
    return Batch(ids, labels, far, 1 / (letters - questions))


TOKEN_TASKS = {name: f"subquad.evals.synthetic:{name}" for name in ("mqar", "copying", "selective_copying", "induction")}


def token_task(name: str, settings: dict[str, Any]):
    """draw(generator, batch) -> Batch of the task called `name`. UserError names unknown tasks and settings and impossible values."""
    task = lookup("token task", name, TOKEN_TASKS)
    known = [key for key, value in inspect.signature(task).parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY]
    raise_all(unknown_settings(settings, known, f"{name}."))
    for key, value in settings.items():
        whole(f"{name}.{key}", value, least=0 if key in ("gap", "noise") else 2)
    task(torch.Generator().manual_seed(0), 1, **settings)
    return lambda generator, batch: task(generator, batch, **settings)


def _copied(generator: Generator, batch: int, length: int, gap: int, letters: int, noise: int) -> Batch:
    text = FIRST + torch.randint(letters, (batch, length), generator=generator)
    places = _choices(generator, batch, length + noise, length).sort(1).values
    source = torch.full((batch, length + noise), BLANK).scatter_(1, places, text)
    ids = torch.cat([source, torch.full((batch, gap), BLANK), torch.full((batch, 1), MARK), text[:, :-1]], 1)
    labels, distance = torch.full_like(ids, NO_LABEL), torch.zeros_like(ids)
    labels[:, -length:] = text
    distance[:, -length:] = torch.arange(ids.shape[1] - length, ids.shape[1]) - places
    return Batch(ids, labels, distance, 1 / letters)


def _choices(generator: Generator, batch: int, of: int, count: int) -> Tensor:
    """[B, count] different numbers below `of`, in random order."""
    return torch.rand(batch, of, generator=generator).argsort(1)[:, :count]


def _at_most(name: str, value: int, most: int, reason: str) -> None:
    if value > most:
        raise UserError(f"{name}: {value} is more than {most}, {reason}.")
