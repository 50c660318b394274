"""Talk to a student or a teacher on the terminal."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from subquad.inputs import prompt_ids
from subquad.linearize import hub
from subquad.linearize.teacher import load_teacher, load_tokenizer


def talk(name: str, prompt: str | None, new_tokens: int, quiet: bool = False) -> list[dict[str, str]]:
    """Answer `prompt`, or every line typed until an empty one, each for itself; returns the turns. Greedy: two runs say the same."""
    model, tokenizer = open_any(name)
    turns = []
    for line in [prompt] if prompt is not None else typed():
        turns.append({"prompt": line, "answer": answer(model, tokenizer, line, new_tokens, stream=not quiet)})
    return turns


def typed():
    """Lines of standard input until an empty one; a `> ` is shown when somebody is there to see it."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def open_any(name: str) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a student folder or of whatever can be a teacher."""
    if Path(name).is_dir() and hub.is_student(name):
        return hub.load(name), load_tokenizer(name)
    return load_teacher(name)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: Any, prompt: str, new_tokens: int, stream: bool = False) -> str:
    """A greedy continuation of a prompt, in the model's chat format when it has one."""
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad, streamer=streamer)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
