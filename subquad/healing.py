"""Stages applied to a student: which parameters move, who the teacher is, and the loop of `distill` run once per stage.

One copy of the weights is teacher and student as long as only mixers or adapters move; a live teacher is opened otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn import Parameter
from transformers import PreTrainedModel

from subquad.distill.data import Batches, Tokens
from subquad.distill.log import JsonLog
from subquad.distill.loop import run_stage
from subquad.distill.lora import add_lora, merge_lora
from subquad.distill.losses import LOGIT_LOSSES, NEEDS_TEACHER
from subquad.distill.objectives import Objective, live_teacher, logits_objective, same_weights, transfer_objective
from subquad.distill.stage import Stage
from subquad.linearize.modes import as_teacher, calibrate, transfer
from subquad.linearize.params import attention_parameters, linear_names, mixer_parameters
from subquad.progress import Reporter

OpenTeacher = Callable[[], PreTrainedModel]


def heal(
    student: PreTrainedModel,
    stages: list[Stage],
    tokens: Tokens,
    *,
    open_teacher: OpenTeacher,
    folder: Path,
    log: JsonLog,
    seed: int,
    report: Reporter,
) -> int:
    """Run the stages in order on `student`, in place; returns the tokens they took. Checkpoints go to folder/<stage name>.

    Called again on a fresh student after a kill, it reads finished stages back and goes on with the one that was running.
    """
    live: PreTrainedModel | None = None
    trained = 0
    for position, stage in enumerate(stages):
        if live is None and needs_live_teacher(stages, position):
            live = open_teacher().to(PartialState().device)  # where the loop moves the student
        trained += heal_stage(
            student, stage, tokens, teacher=live, folder=folder / stage.name, log=log, seed=seed + position, report=report
        )
    return trained


def stage_problems(stages: list[Stage], tokens: Tokens, mixers: bool, dtype: torch.dtype) -> list[str]:
    """What the loop would refuse, before any training: too little text, mixers without parameters, weights of `dtype` that cannot be trained."""
    weights, own = {str(dtype).removeprefix("torch.")}, {"float32"}  # mixers and adapters are made in fp32
    moved = {"all": weights, "attention": weights, "lora": own, "mixers": own if mixers else set()}
    return [problem for stage in stages for problem in (*tokens.shortage(stage.context), *stage.unfit(moved[stage.train]))]


def heal_stage(
    student: PreTrainedModel,
    stage: Stage,
    tokens: Tokens,
    *,
    teacher: PreTrainedModel | None,
    folder: Path,
    log: JsonLog,
    seed: int,
    report: Reporter,
) -> int:
    """One stage, in place; returns its tokens. Adapters are merged into the weights they adapt when it ends."""
    batches = Batches(tokens, context=stage.context, batch=stage.batch, repeat=stage.repeat, seed=seed)
    if stage.inputs == "teacher":
        calibrate(student, batches[0].to(student.device))
    parameters = trainable(student, stage, seed)
    count = sum(parameter.numel() for parameter in parameters.values())
    report.line(f"{stage.name}: train {stage.train}, {count:,} parameters, {stage.steps} steps of {stage.batch} x {stage.context} tokens")
    result = follow_stage(
        stage,
        model=student,
        parameters=parameters,
        objective=make_objective(stage, student, teacher),
        batches=batches,
        folder=folder,
        log=log,
        report=report,
    )
    if stage.train == "lora":
        merge_lora(student)
    return result.tokens


def follow_stage(stage: Stage, *, log: JsonLog, report: Reporter, **arguments: Any):
    """`run_stage` with its rows in log.jsonl and its steps on the progress bar."""
    with report.track(stage.name, stage.steps) as tick:

        def write(row: dict[str, Any]) -> None:
            log.write(row)
            tick(row["step"], **{key: row[key] for key in ("loss", "tokens_per_second") if key in row})

        result = run_stage(stage, log=write, rewind=log.rewind, **arguments)
    if result.skipped:
        report.line(f"{stage.name}: finished before, read back")
    return result


def needs_live_teacher(stages: list[Stage], position: int) -> bool:
    """True when a loss asks for the teacher's logits and the student's own weights are no longer, or stop being, the teacher's."""
    if not any(name in NEEDS_TEACHER and name in LOGIT_LOSSES for name in stages[position].losses):
        return False
    return stages[position].train in ("attention", "all") or any(stage.train != "mixers" for stage in stages[:position])


def trainable(student: PreTrainedModel, stage: Stage, seed: int) -> dict[str, Parameter]:
    """Full name -> parameter, adapters put in when the stage wants them. The mixers' own parameters move in every kind of stage."""
    if stage.train == "all":
        return dict(student.named_parameters())
    if stage.train == "attention":
        return attention_parameters(student)
    if stage.train == "mixers":
        return mixer_parameters(student)
    return mixer_parameters(student) | add_lora(student, stage.lora, lora_targets(student, stage.lora.targets), seed)


def lora_targets(student: PreTrainedModel, targets: str) -> list[str]:
    """Names of the linear modules that get adapters: attention's, or every one but mixers' own and the output embeddings."""
    if targets == "attention":
        return linear_names(student)
    head = student.get_output_embeddings()
    linear = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return [name for name in linear if f"{name}.weight" not in mixer_parameters(student)]


def make_objective(stage: Stage, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Objective:
    """(batch_BT, backward) -> numbers: layer-local transfer, or the student's logits against the teacher's."""
    if stage.inputs == "teacher":
        return transfer_objective(student, transfer, stage.losses)
    who = same_weights(student, as_teacher) if teacher is None else live_teacher(teacher)
    return logits_objective(student, who, stage.losses, stage.temperature)
