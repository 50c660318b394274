"""Agreement with the teacher on the same blocks: perplexity can be bought by fitting the text, agreement cannot.

Key: C positions of a chunk, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from subquad.errors import UserError
from subquad.evals.logits import Logits
from subquad.evals.models import Models, measuring
from subquad.evals.rows import Row, row
from subquad.evals.text import blocks, describe


@dataclass
class Sums:
    """Sums over positions so far."""

    kl: float = 0.0  # nats
    same: int = 0
    positions: int = 0


def agreement(models: Models, tokens: Tensor, *, context: int = 1024, windows: int | None = 4) -> list[Row]:
    """Metrics kl_to_teacher, the mean over positions of KL(teacher || model) at temperature 1 (nats per token), and top1_agreement, the
    share of positions where both put the same token first. The first of `models` is the teacher: 0 and 1 by definition, not measured.

    Every position of the first `windows` blocks of `context` tokens counts (None: all that fit). Cost: windows x context tokens forward for
    each model, the teacher included. A model's output layer must be the same inside and outside its context.
    """
    cut = blocks("agreement", tokens, context, windows)
    if not models:
        return []
    (teacher_name, open_teacher), *others = models.items()
    sums = {name: Sums() for name, _ in others}
    for block in cut:
        with measuring(open_teacher) as model:
            teacher = Logits(model, block.ids)
        for name, opener in others:
            with measuring(opener) as model:
                _add(sums[name], teacher, Logits(model, block.ids), name)
    setting = describe(cut)
    rows = [row(teacher_name, "kl_to_teacher", setting, 0.0), row(teacher_name, "top1_agreement", setting, 1.0)]
    for name, total in sums.items():
        rows.append(row(name, "kl_to_teacher", setting, total.kl / total.positions))
        rows.append(row(name, "top1_agreement", setting, total.same / total.positions))
    return rows


def _add(sums: Sums, teacher: Logits, student: Logits, name: str) -> None:
    for part, student_CV in student.chunks():
        teacher_CV = teacher[part].to(student_CV.device)
        if teacher_CV.shape != student_CV.shape:
            sizes = f"{student_CV.shape[-1]} output tokens and the teacher {teacher_CV.shape[-1]}"
            raise UserError(f"agreement: {name} has {sizes}; they cannot be compared.")
        sums.same += int((teacher_CV.argmax(-1) == student_CV.argmax(-1)).sum())
        sums.kl += kl(teacher_CV, student_CV).double().sum().item()
        sums.positions += len(student_CV)


def kl(teacher_CV: Tensor, student_CV: Tensor) -> Tensor:
    """KL(teacher || student) of every position in nats: fp32 [C]."""
    teacher_CV, student_CV = teacher_CV.log_softmax(-1), student_CV.log_softmax(-1)
    return teacher_CV.exp().mul_(teacher_CV - student_CV).sum(-1)
