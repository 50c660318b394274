"""Save a student folder whole or not at all, and open one.

DIR/config.json (plan, provenance, the teacher's config)  model*.safetensors  tokenizer files  generation_config.json  README.md  *.py (bundle.py)
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from subquad.errors import UserError, first_line
from subquad.linearize.card import write_card
from subquad.linearize.seam import seams
from subquad.linearize.student import MODEL_TYPE, SubquadForCausalLM


def is_student(folder: str | Path) -> bool:
    """True for a folder written by `save`."""
    return _read_config(Path(folder)).get("model_type") == MODEL_TYPE


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Raise UserError when `folder` holds something and may not be replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite and is_student(folder)):
        how = (
            "it holds no student, so it is never overwritten"
            if overwrite
            else "give --overwrite (overwrite=True) to replace a student in it"
        )
        raise UserError(f"{folder} is not empty: choose another folder; {how}.")


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a converted model as a student folder. It is built beside `folder` and moved into place when complete.

    provenance: JSON values for config.json and the card. Raises UserError for an unconverted model, a folder in use, or a disk without room.
    """
    folder = Path(folder)
    check_free(folder, overwrite)
    if not seams(model):
        raise UserError("This model has no converted layers, so there is no student to save: call subquad.linearize(model, plan) first.")
    if provenance is not None:
        model.subquad_provenance = provenance
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if adapters:
        raise UserError(
            f"This model still has adapters (for example {adapters[0]}): merge them first (subquad.distill.lora.merge_lora, or peft's merge_and_unload)."
        )
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        model.save_pretrained(building)
        if tokenizer is not None:
            tokenizer.save_pretrained(building)
        write_card(building / "README.md", model.subquad_plan, getattr(model, "subquad_provenance", {}))
        _sync(building)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except (OSError, SafetensorError) as error:
        if _is_disk(error):
            raise UserError(
                f"Could not write {folder}: {error}. Free some room or choose another folder; nothing was left behind."
            ) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open a student folder (keyword arguments as PreTrainedModel.from_pretrained), in eval mode.

    Raises UserError when the folder is missing, is not a student, or is damaged.
    """
    folder = Path(folder)
    if not is_student(folder):
        raise UserError(
            f"{folder} is not a student folder: its config.json should say model_type {MODEL_TYPE!r}. Make one with subquad run or subquad linearize."
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}). Save or download the student again.") from error
    try:
        return SubquadForCausalLM.from_pretrained(str(folder), **kwargs).eval()
    except OSError as error:
        raise UserError(f"Could not open {folder}: {first_line(error)} Save or download the student again.") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}.")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Save or download the model again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged (a {type(config).__name__} where a mapping should be). Save or download the model again.")
    return config


def _is_disk(error: Exception) -> bool:
    return isinstance(error, OSError) or any(word in str(error) for word in ("No space left", "I/O error", "StorageFull", "File too large"))


def _sync(folder: Path) -> None:
    """Everything on the disk, and readable like any other file (safetensors writes 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
