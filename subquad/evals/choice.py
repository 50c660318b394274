"""Multiple choice by likelihood, from files: questions with choices, minimal pairs, and MMLU. Accuracy as lm-evaluation-harness defines it.

A choice's score is ln p(choice | question), summed over its tokens. accuracy: the best score is the right choice's. accuracy_norm: the same with
scores divided by the choice's length in characters.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from subquad.evals.answers import Answers
from subquad.evals.local import LETTERS, Choice, read
from subquad.evals.models import Models
from subquad.evals.paired import mean, paired_rows
from subquad.evals.requests import pair_request, score_all
from subquad.evals.rows import Row, row
from subquad.evals.text import whole

Names = str | Sequence[str]


def choice(models: Models, tokens: Tensor, *, tokenizer: Any, answers: Answers, files: Names = (), limit: int | None = None) -> list[Row]:
    """Metrics accuracy and accuracy_norm of each of `files` (kind choice of local.py), over its first `limit` items (None: all).

    A query that starts with 'Question:' is shown with '\\nAnswer:' after it (ARC, PIQA); any other as it stands (HellaSwag, COPA). Choices
    follow after a space. Chance: the mean of 1 / choices.
    """
    sets = read("choice", files, limit)
    if not models:
        return []
    rows = []
    for file in sets:
        items, of = file.asked, len(file.every)
        requests = [pair_request(tokenizer, shown(item), f" {text}") for item in items for text in item.choices]
        chance = mean([1 / len(item.choices) for item in items])
        setting = f"{file.name}, {len(items)} of {of} items, 0-shot"
        logprobs = _per_item(score_all(models, requests, answers), items)
        more = {"chance": chance, "task": file.name, "of": of}
        for metric, lengths in (("accuracy", False), ("accuracy_norm", True)):
            scores = {
                name: [correct(item, found, lengths) for item, found in zip(items, per, strict=True)] for name, per in logprobs.items()
            }
            rows += paired_rows(metric, setting, scores, answers, **more)
    return rows


def pairs(models: Models, tokens: Tensor, *, tokenizer: Any, answers: Answers, files: Names = (), limit: int | None = None) -> list[Row]:
    """Metrics accuracy over all `files` (kind pairs of local.py: BLiMP) and accuracy_by_paradigm of each of several: the good sentence is the more
    likely one. `limit` pairs of each file. A sentence starts after the prefix token and a space. Chance 1/2."""
    sets = read("pairs", files, limit)
    if not models:
        return []
    every = [pair for file in sets for pair in file.asked]
    found = score_all(models, [pair_request(tokenizer, "", f" {text}") for pair in every for text in pair], answers)
    right = {
        name: [float(good[0].logprob >= bad[0].logprob) for good, bad in zip(s[::2], s[1::2], strict=True)] for name, s in found.items()
    }
    paradigms = f"{len(sets)} paradigms" if len(sets) > 1 else sets[0].name
    of = sum(len(file.every) for file in sets)
    rows = paired_rows("accuracy", f"BLiMP, {paradigms}, {len(every)} of {of} pairs", right, answers, chance=0.5, task="blimp", of=of)
    at = 0
    for file in sets if len(sets) > 1 else ():
        part = {name: values[at : at + len(file.asked)] for name, values in right.items()}
        rows += paired_rows("accuracy_by_paradigm", f"BLiMP {file.name}, {len(file.asked)} pairs", part, answers, chance=0.5, task="blimp")
        at += len(file.asked)
    return rows


def mmlu(
    models: Models, tokens: Tensor, *, tokenizer: Any, answers: Answers, files: Names = (), limit: int | None = None, shots: int = 4
) -> list[Row]:
    """Metrics accuracy and option_bias of MMLU files (kind mmlu of local.py), one a subject: which of ' A' .. ' D' is the most likely after the
    question, its choices, and `shots` other questions of the same file with their answers.

    option_bias: half the sum over letters of |share predicted - share right|; 0 is none, 0.75 always the same letter. Chance of accuracy 1/4.
    """
    whole("mmlu.shots", shots, least=0)
    sets = read("mmlu", files, limit)
    if not models:
        return []
    items = [item for file in sets for item in file.asked]
    requests = []
    for file in sets:
        for item in file.asked:
            prompt = _mmlu_prompt(_subject(file.name), [other for other in file.every if other != item][:shots], item)
            requests += [pair_request(tokenizer, prompt, f" {letter}") for letter in LETTERS]
    logprobs = _per_item(score_all(models, requests, answers), items)
    setting = f"MMLU, {len(sets)} subject{'s' * (len(sets) != 1)}, {len(items)} items, {shots} shots"
    scores = {name: [correct(item, found) for item, found in zip(items, per, strict=True)] for name, per in logprobs.items()}
    return paired_rows("accuracy", setting, scores, answers, chance=0.25, task="mmlu") + [
        row(name, "option_bias", setting, bias([item.gold for item in items], [best(found) for found in per]), task="mmlu", n=len(items))
        for name, per in logprobs.items()
    ]


def shown(item: Choice) -> str:
    """The question as the model sees it."""
    return item.query.rstrip() + "\nAnswer:" if item.query.startswith("Question:") else item.query


def best(scores: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=lambda index: scores[index])


def correct(item: Choice, logprobs: Sequence[float], by_length: bool = False) -> float:
    """1.0 or 0.0."""
    lengths = [len(text) if by_length else 1 for text in item.choices]
    return float(best([value / length for value, length in zip(logprobs, lengths, strict=True)]) == item.gold)


def bias(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """Total variation distance between how often each option is right and how often it is chosen."""
    right, chosen = Counter(gold), Counter(predicted)
    return sum(abs(right[option] - chosen[option]) for option in {*right, *chosen}) / 2 / len(gold)


def _per_item(found: dict[str, list], items: Sequence[Choice]) -> dict[str, list[list[float]]]:
    """model -> for every item, the score of each choice."""
    result = {}
    for name, scored in found.items():
        flat, per, at = [spans[0].logprob for spans in scored], [], 0
        for item in items:
            per.append(flat[at : at + len(item.choices)])
            at += len(item.choices)
        result[name] = per
    return result


def _subject(name: str) -> str:
    return name.removesuffix("_dev").removesuffix("_test").replace("_", " ")


def _mmlu_prompt(subject: str, shots: Sequence[Choice], item: Choice) -> str:
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return head + "".join(f"{_mmlu_question(shot)} {LETTERS[shot.gold]}\n\n" for shot in shots) + _mmlu_question(item)


def _mmlu_question(item: Choice) -> str:
    return item.query.strip() + "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=True)) + "\nAnswer:"
