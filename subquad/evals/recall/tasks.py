"""Recall tasks: accuracy by length and depth. One maker of items.py, one function, one row of TASKS.

An answer counts when each of its tokens is the most likely one given the text and the right tokens before it: what greedy decoding would write, at
the price of one forward pass. With several answers in an item, the score is the share that counts.

Lengths are tokens of the model's own tokenizer, the answer included: the most text that fits is made, never more.
"""

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

from torch import Tensor

from subquad.errors import UserError
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


def passkey(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Metrics accuracy for each of `lengths` (tokens) and accuracy_by_depth for each depth in it: a five-digit key in text of no interest.

    `samples` texts for each length and depth, drawn with `seed`, the same for all models. Chance 1 / 90,000.
    """
    return ask(models, "passkey", items.passkey, tokenizer, answers, lengths, depths, samples, seed)


def niah(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    variants: str | Sequence[str] = ("single", "multi_key", "multi_value"),
    needles: int = 4,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 2,
    seed: int = 0,
) -> list[Row]:
    """Needles in a haystack by RULER's definitions, each of `variants`: single, multi_key (one of `needles` names is asked for), multi_value (all
    of a name's `needles` numbers). Seven digits. Chance 1 / needles for the latter two."""
    several = [variants] if isinstance(variants, str) else list(variants)
    known = ("single", "multi_key", "multi_value")
    if wrong := [name for name in several if name not in known]:
        raise UserError(f"niah.variants: got {', '.join(map(repr, wrong))}; known: {', '.join(known)}.")
    whole("niah.needles", needles, least=2)
    rows = []
    for variant in several:
        maker = partial(items.niah, variant=variant, needles=needles)
        rows += ask(models, f"niah_{variant}", maker, tokenizer, answers, lengths, depths, samples, seed)
    return rows


def phonebook(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """One number of a phone book (SEEDS H03). Chance 1 / names."""
    return ask(models, "phonebook", items.phonebook, tokenizer, answers, lengths, depths, samples, seed)


def mqar(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    queries: int = 4,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Multi-query associative recall (SEEDS H05): pairs of words, then `queries` of the first words. Chance 1 / pairs. From 147 pairs on the
    words are made up, which is harder to match."""
    whole("mqar.queries", queries, least=1)
    return ask(models, "mqar", partial(items.mqar, queries=queries), tokenizer, answers, lengths, depths, samples, seed)


def induction(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """What came after the last word when it stood here before: depth d of length n is a distance of (1 - d) n tokens. Chance 1 / words."""
    return ask(models, "induction", items.induction, tokenizer, answers, lengths, depths, samples, seed)


def copying(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int] = LENGTHS,
    samples: int = 2,
    seed: int = 0,
) -> list[Row]:
    """Made-up words, then the same again; half of each of `lengths` is the copy. Chance 1 / words."""
    return ask(models, "copying", items.copying, tokenizer, answers, lengths, (0.0,), samples, seed)


def selective_copying(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    marked: int = 8,
    lengths: int | Sequence[int] = LENGTHS,
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """The `marked` words that stand in lines marked with yes. Chance 1 / lines."""
    whole("selective_copying.marked", marked, least=1)
    return ask(
        models, "selective_copying", partial(items.selective_copying, marked=marked), tokenizer, answers, lengths, (0.0,), samples, seed
    )


def listops(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    shots: int = 4,
    lengths: int | Sequence[int] = LENGTHS,
    samples: int = 20,
    seed: int = 0,
) -> list[Row]:
    """Nested MIN, MAX, MED, SM in Long Range Arena's notation (SEEDS H01), after `shots` short solved ones. Chance 1/10; small pretrained models
    do not solve it, and then the rows say so."""
    whole("listops.shots", shots, least=0)
    return ask(models, "listops", partial(items.listops, shots=shots), tokenizer, answers, lengths, (0.0,), samples, seed)


def variable_tracking(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    hops: int = 3,
    chains: int = 2,
    lengths: int | Sequence[int] = LENGTHS,
    depths: Sequence[float] = (0.0, 0.5),
    samples: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Which variables hold a value that was handed on `hops` times, beside `chains` - 1 other values (RULER). Chance 1 / variables."""
    whole("variable_tracking.hops", hops, least=1)
    whole("variable_tracking.chains", chains, least=1)
    maker = partial(items.variable_tracking, hops=hops, chains=chains)
    return ask(models, "variable_tracking", maker, tokenizer, answers, lengths, depths, samples, seed)


# ---- the runner --------------------------------------------------------------------------------------------------------------------------


def ask(
    models: Models,
    name: str,
    maker: Maker,
    tokenizer: Any,
    answers: Answers,
    lengths: int | Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> list[Row]:
    """Rows of one recall task: accuracy per length, accuracy_by_depth per length and depth where there are several depths."""
    sizes = wholes(f"{name}.lengths", lengths, least=16)
    whole(f"{name}.samples", samples, least=1)
    whole(f"{name}.seed", seed, least=0)
    if not depths or not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in depths):
        raise UserError(f"{name}.depths: expected numbers from 0 (start) to 1 (end), got {list(depths)!r}.")
    if not models:
        return []
    made = {size: [_fitted(maker, tokenizer, name, size, depth, f"{name} {size} {depth} {i} {seed}") for depth in depths for i in range(samples)]
            for size in sizes}  # fmt: skip
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


def _fitted(maker: Maker, tokenizer: Any, name: str, length: int, depth: float, seed: str) -> Item:
    """The largest item of at most `length` tokens. The same seed for every size, so that a search by halving works."""

    def size(units: int) -> int:
        return len(tokenizer.encode(maker(Random(seed), units, depth).text))

    low, high = 1, 2
    if size(low) > length:
        raise UserError(f"{name}.lengths: the shortest text has {size(low)} tokens, {length} are too few. Give at least {size(low)}.")
    while size(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
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
