"""Distillation: stages as data, one loop.

    stage.py       what a stage says: what moves, where its inputs come from, which losses, how many tokens
    data.py        text sources -> documents -> token ids -> batches that are a function of (seed, step)
    losses/        plain loss functions, and the pass that never builds whole logits
    objectives.py  (batch, backward) -> numbers to log: layer-local transfer, or logits against the teacher
    loop.py        run_stage: the one training loop
    checkpoint.py  folders that are either complete or absent
    log.py         JSON lines that can be taken back to a step
    lora.py        peft adapters in place, and merged away again

This package never imports `linearize`: what it needs from the student (parameters, `transfer`, `as_teacher`) is passed in.
Nothing is imported here, so that reading a recipe does not wait for torch.
"""
