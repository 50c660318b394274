"""Run as a program by test_resume.py: two stages with checkpoints and a log, into the folder given. May be killed anywhere.

Usage: worker.py FOLDER SAVE_EVERY_SECONDS PAUSE, with tests/ and the repository on PYTHONPATH. PAUSE: seconds to wait after each step,
so that a signal arrives in the middle of a stage on a busy machine too.
"""

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill.student import as_teacher, mixers, projections, stage, student, text, transfer
from subquad.distill.data import Batches
from subquad.distill.log import JsonLog
from subquad.distill.loop import run_stage
from subquad.distill.lora import add_lora, merge_lora
from subquad.distill.objectives import logits_objective, same_weights, transfer_objective
from subquad.distill.signals import Interrupted

STAGES = (
    stage(name="transfer", inputs="teacher", losses={"attention_output": 1.0}, tokens="2k"),
    stage(name="lora", train="lora", losses={"kl": 1.0, "cross_entropy": 0.1}, tokens="2k", repeat=0.5, lora={"rank": 4, "dropout": 0.1}),
)


def main(folder: Path, save_every_seconds: float, pause: float) -> None:
    torch.set_num_threads(1)
    model, log = student(), JsonLog(folder / "log.jsonl")

    def write(row):
        log.write(row)
        time.sleep(pause)

    for now in STAGES:
        parameters = mixers(model)
        if now.train == "lora":
            parameters |= add_lora(model, now.lora, projections(model), seed=5)
            objective = logits_objective(model, same_weights(model, as_teacher), now.losses)
        else:
            objective = transfer_objective(model, transfer, now.losses)
        batches = Batches(text(), now.context, now.batch, now.repeat, seed=5)
        result = run_stage(
            now,
            model=model,
            parameters=parameters,
            objective=objective,
            batches=batches,
            folder=folder / now.name,
            log=write,
            rewind=log.rewind,
            save_every_seconds=save_every_seconds,
        )
        # One write a line: two processes share this pipe, and print() writes its parts one by one.
        os.write(1, f"{now.name} {'skipped' if result.skipped else 'ran'} {result.losses}\n".encode())
    merge_lora(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "final.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(130)
