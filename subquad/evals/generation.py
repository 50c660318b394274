"""What models write by themselves. Likelihood on given text hides how errors grow once a model reads its own output.

Key: C positions of a chunk, V vocabulary.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.evals.agreement import kl
from subquad.evals.answers import Answers
from subquad.evals.local import Problem, limited, read
from subquad.evals.logits import Logits
from subquad.evals.models import Models, measuring
from subquad.evals.paired import mean, paired_rows
from subquad.evals.requests import generate, write
from subquad.evals.rows import Row
from subquad.evals.text import blocks, whole

GRAM = 4  # tokens of a repeated piece
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def generation(
    models: Models, tokens: Tensor, *, tokenizer: Any, answers: Answers, prompts: int = 8, context: int = 256, new_tokens: int = 64
) -> list[Row]:
    """Greedy continuations of the first `prompts` blocks of `context` tokens of the text, `new_tokens` long. Metrics, means over prompts:

    repetition: share of 4-grams of a continuation that have been in it before. same_text: share of `new_tokens` before a continuation leaves the
    teacher's. free_running_kl (nats per token) and free_running_agreement: teacher against model on the model's own continuation.
    """
    whole("generation.new_tokens", new_tokens, least=GRAM + 1)
    cut = blocks("generation", tokens, context, whole("generation.prompts", prompts, least=1))
    if not models:
        return []
    starts = [tuple(block.ids.tolist()) for block in cut]
    written = {name: write(name, opener, starts, new_tokens, answers, whole=True) for name, opener in models.items()}
    setting = f"{prompts} x {new_tokens} tokens after {context}"
    reference, *others = list(models)
    rows = paired_rows("repetition", setting, {name: [repetition(ids) for ids in found] for name, found in written.items()}, answers)
    same = {name: [_same(a, b) / new_tokens for a, b in zip(found, written[reference], strict=True)] for name, found in written.items()}
    rows += paired_rows("same_text", setting, same, answers)
    apart = {
        name: [_apart(models[reference], models[name], ids, own) for ids, own in zip(starts, written[name], strict=True)] for name in others
    }
    for index, (metric, perfect) in enumerate((("free_running_kl", 0.0), ("free_running_agreement", 1.0))):
        scores = {reference: [perfect] * prompts, **{name: [pair[index] for pair in found] for name, found in apart.items()}}
        rows += paired_rows(metric, setting, scores, answers)
    return rows


def gsm8k(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    files: str | Sequence[str] = (),
    limit: int | None = 50,
    shots: int = 4,
    new_tokens: int = 200,
) -> list[Row]:
    """Metric accuracy of written answers to word problems (kind gsm8k of local.py): greedy, `shots` solved problems first (the last ones of the
    file, which are not asked), the number after '####' or else the last one written must be right. Chance 0."""
    whole("gsm8k.shots", shots, least=0)
    whole("gsm8k.new_tokens", new_tokens, least=1)
    rows = []
    for file in read("gsm8k", files):
        every = file.every
        if len(every) <= shots:
            raise UserError(f"gsm8k.shots: {shots} solved problems leave none of the {len(every)} in {file.name} to ask. Lower shots.")
        asked = limited("gsm8k", every[: len(every) - shots], limit)
        if not models:
            continue
        head = "".join(f"Question: {problem.question}\nAnswer: {problem.answer}\n\n" for problem in every[len(every) - shots :])
        prompts = [tokenizer.encode(f"{head}Question: {problem.question}\nAnswer:") for problem in asked]
        scores = {}
        for name, opener in models.items():
            texts = generate(name, opener, tokenizer, prompts, new_tokens, ["Question:", "\n\n"], answers)
            scores[name] = [float(right(problem, text)) for problem, text in zip(asked, texts, strict=True)]
        setting = f"{file.name}, {len(asked)} of {len(every)} items, {shots} shots, {new_tokens} tokens, greedy"
        rows += paired_rows("accuracy", setting, scores, answers, task=file.name, of=len(every))
    return rows


def right(problem: Problem, text: str) -> bool:
    """Whether the number a text ends with is the problem's."""
    found = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else NUMBER.findall(text)[-1:]
    return bool(found) and _plain(found[0]) == _plain(problem.number)


def _plain(number: str) -> float | str:
    number = number.replace(",", "").replace("$", "")
    try:
        return float(number)
    except ValueError:
        return number


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that have stood before: 0 for text that never repeats."""
    grams = [tuple(ids[at : at + GRAM]) for at in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _same(ids: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def _apart(teacher, opener, start: Sequence[int], own: Sequence[int]) -> tuple[float, float]:
    """(mean KL, share of equal first choices) at the places where `own` was written."""
    ids = torch.tensor([*start, *own])
    part = slice(len(start) - 1, len(ids) - 1)
    with measuring(teacher) as model:
        teacher_CV = Logits(model, ids)[part]
    with measuring(opener) as model:
        student_CV = Logits(model, ids)[part].to(teacher_CV.device)
    same = (teacher_CV.argmax(-1) == student_CV.argmax(-1)).double()
    return kl(teacher_CV, student_CV).double().mean().item(), mean(same.tolist())
