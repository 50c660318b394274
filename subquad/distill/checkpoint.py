"""Checkpoint folders that are either complete or absent: written beside their place, flushed to disk, then renamed. No pickle.

    folder/step-00000120/{model.safetensors, optimizer.safetensors, state.json}     the newest two
    folder/done/{model.safetensors, state.json}                                     the trained weights, once the stage is complete

A kill at any moment leaves at most a `*.partial` folder, which is never read and is removed by the next save.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.errors import UserError

KEEP = 2
_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def done_folder(folder: Path) -> Path:
    return folder / "done"


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write `<name>.safetensors` per entry of `tensors`, and state.json, as one unit. An existing folder is replaced.

    Raises UserError that names the folder when the disk is full or not writable; nothing half-written stays.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: value.detach().contiguous() for key, value in group.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot save the checkpoint {folder}: {reason}. Free some space or choose another folder, then run the same command again; "
            "it continues from the last complete checkpoint."
        ) from error


def load(folder: Path, *names: str) -> tuple[dict[str, Any], ...]:
    """(state, tensors of names[0], tensors of names[1], ...) of a complete checkpoint. A damaged file is a UserError that names it."""
    file = folder / "state.json"
    try:
        loaded = [json.loads(file.read_text(encoding="utf-8"))]
        for name in names:
            file = folder / f"{name}.safetensors"
            loaded.append(load_file(file))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"Cannot read the checkpoint file {file}: {error}. Delete {folder}; an older state is used then.") from error
    return tuple(loaded)


def prune(folder: Path, keep: int = KEEP) -> None:
    """Remove all but the newest `keep` step checkpoints, and what a killed save left behind."""
    for old in [*_steps(folder)[: -keep or None], *folder.glob(f"*{_PARTIAL}")]:
        shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove every checkpoint of a stage, finished or not; other files in the folder stay."""
    shutil.rmtree(done_folder(folder), ignore_errors=True)
    prune(folder, keep=0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's memory as 'exp_avg/<parameter name>' -> tensor; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{key}/{names[index]}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of optimizer_tensors. A parameter that never had a gradient has no entry."""
    index = {name: position for position, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        state.setdefault(index[name], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _steps(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _flush(path: Path) -> None:
    """fsync: after a power cut the rename must not be there without the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
