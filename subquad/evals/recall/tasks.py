"""Recall tasks: accuracy by length and depth. One maker of items.py, one row here, one row of TASKS.

An answer counts when each of its tokens is the most likely one given the text and the right tokens before it: what greedy decoding would write, at
the price of one forward pass. With several answers in an item, the score is the share that counts.

Lengths are tokens of the model's own tokenizer, the answer included: the most text that fits is made, never more.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

from torch import Tensor

from subquad.errors import UserError, raise_all
from subquad.evals.answers import Answers
from subquad.evals.models import Models
from subquad.evals.paired import mean, paired_rows
from subquad.evals.recall import items
from subquad.evals.recall.items import Item, Maker
from subquad.evals.requests import Request, score_all
from subquad.evals.rows import Row
from subquad.evals.text import whole, wholes

LENGTHS = (512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANYWHERE = (0.0,)  # of makers that take no notice of a depth


def recall(maker: Maker, samples: int = 4, depths: Sequence[float] = DEPTHS, **least: int) -> Callable[..., list[Row]]:
    """The task `task(models, tokens, *, settings)` that asks texts of `maker`: metrics accuracy for each of `lengths` (tokens) and
    accuracy_by_depth for each depth in it. Chance is the maker's.

    Its settings: lengths, depths (unless the answer is ANYWHERE), samples (texts for each length and depth, drawn with `seed`, the same for all
    models), seed, and the maker's own; least: the smallest value of each of those.
    """
    name, shared = maker.__name__, inspect.signature(partial(ask, "", maker))
    defaults = {"samples": samples, "depths": depths}
    parameters = [parameter.replace(default=defaults.get(key, parameter.default)) for key, parameter in shared.parameters.items()
                  if key != "depths" or depths is not ANYWHERE]  # fmt: skip
    own = {key: inspect.signature(maker).parameters[key] for key in least}

    def task(models: Models, tokens: Tensor, **settings: Any) -> list[Row]:
        given = {key: whole(f"{name}.{key}", settings.pop(key), least[key]) for key in own if key in settings}
        return ask(name, partial(maker, **given), models, tokens, **{**defaults, **settings})

    task.__name__, task.__doc__ = name, maker.__doc__
    task.__signature__ = shared.replace(
        parameters=[*parameters, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own.values())]
    )
    return task


def ask(
    name: str,
    maker: Maker,
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int] = LENGTHS,
    depths: float | Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Rows of one recall task: accuracy per length, accuracy_by_depth per length and depth where there are several depths."""
    sizes = wholes(f"{name}.lengths", lengths, least=16)
    whole(f"{name}.samples", samples, least=1)
    whole(f"{name}.seed", seed, least=0)
    depths = [depths] if isinstance(depths, int | float) else list(depths)
    if not depths or not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in depths):
        raise UserError(f"{name}.depths: expected numbers from 0 (start) to 1 (end), got {depths!r}.")
    drawn = {size: [(f"{name} {size} {depth} {i} {seed}", depth) for depth in depths for i in range(samples)] for size in sizes}
    if tokenizer is not None:
        raise_all([problem for size in sizes for problem in _too_short(maker, tokenizer, name, size, drawn[size])])
    if not models:
        return []
    made = {size: [_fitted(maker, tokenizer, size, *one) for one in drawn[size]] for size in sizes}
    requests = {size: [_request(tokenizer, item) for item in found] for size, found in made.items()}
    every = [request for found in requests.values() for request in found]
    scored = score_all(models, every, answers)
    rows, at = [], 0
    for size in sizes:
        count = len(made[size])
        part = {
            model: [mean([float(span.greedy) for span in spans]) for spans in found[at : at + count]] for model, found in scored.items()
        }
        at += count
        chance = mean([item.chance for item in made[size]])
        setting = f"{name}, {size} tokens, {count} texts, seed {seed}"
        rows += paired_rows("accuracy", setting, part, answers, chance=chance, task=name, length=size)
        for number, depth in enumerate(depths if len(depths) > 1 else ()):
            here = {model: values[number * samples : (number + 1) * samples] for model, values in part.items()}
            setting = f"{name}, {size} tokens, depth {depth:g}, {samples} texts, seed {seed}"
            rows += paired_rows("accuracy_by_depth", setting, here, answers, chance=chance, task=name, length=size, depth=float(depth))
    return rows


def _too_short(maker: Maker, tokenizer: Any, name: str, length: int, drawn: Sequence[tuple[str, float]]) -> list[str]:
    """What is wrong when one of the texts to be drawn, (seed, depth), has no form of at most `length` tokens."""
    least = max(len(tokenizer.encode(maker(Random(seed), 1, depth).text)) for seed, depth in drawn)
    return [f"{name}.lengths: the shortest text has {least} tokens, {length} are too few. Give at least {least}."] if least > length else []


def _fitted(maker: Maker, tokenizer: Any, length: int, seed: str, depth: float) -> Item:
    """The largest item of at most `length` tokens. The same seed for every size, so that a search by halving works."""

    def fits(units: int) -> bool:
        return len(tokenizer.encode(maker(Random(seed), units, depth).text)) <= length

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return maker(Random(seed), low, depth)


def _request(tokenizer: Any, item: Item) -> Request:
    """Token places of the answers. A token that begins before an answer and reaches into it counts to the answer."""
    if tokenizer.is_fast:
        encoded = tokenizer(item.text, return_offsets_mapping=True)
        spans = []
        for start, stop in item.answers:
            inside = [at for at, (a, b) in enumerate(encoded["offset_mapping"]) if b > start and a < stop and b > a]
            spans.append((inside[0], inside[-1] + 1))
        return Request(tuple(encoded["input_ids"]), tuple(spans))
    ids = tokenizer.encode(item.text)
    ends = [tuple(len(tokenizer.encode(item.text[:place])) for place in answer) for answer in item.answers]
    return Request(tuple(ids), tuple(ends))


# ---- the tasks ---------------------------------------------------------------------------------------------------------------------------

passkey = recall(items.passkey)
niah_single = recall(items.niah_single, samples=2)
niah_multi_key = recall(items.niah_multi_key, samples=2, needles=2)
niah_multi_value = recall(items.niah_multi_value, samples=2, needles=2)
phonebook = recall(items.phonebook)
mqar = recall(items.mqar, queries=1)
induction = recall(items.induction)
copying = recall(items.copying, samples=2, depths=ANYWHERE)
selective_copying = recall(items.selective_copying, depths=ANYWHERE, marked=1)
listops = recall(items.listops, samples=20, depths=ANYWHERE, shots=0)
variable_tracking = recall(items.variable_tracking, depths=(0.0, 0.5), hops=1, chains=1)
