"""The run folder: what is in it, and who may write to it.

DIR/recipe.yaml (resolved)  plan.json  selection.json  log.jsonl  checkpoints/<stage>/  student/  results.json
A folder belongs to one recipe. The same recipe continues it; a different one is refused unless told to overwrite.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from subquad.errors import UserError, first_line

ENTRIES = ("recipe.yaml", "plan.json", "selection.json", "log.jsonl", "results.json", "sample.txt", "checkpoints", "student")
_LOCK = ".lock"
MAIN = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` every process computes, and the first one writes


class RunFolder:
    """`with RunFolder(path, recipe_text, overwrite) as folder:` holds the folder against a second process for as long as the block runs.

    `rewritten` brings the text of an older run to today's form before the two are compared.
    """

    def __init__(self, path: str | Path, recipe_text: str, overwrite: bool = False, rewritten: Callable[[str], str] = str):
        self.path, self.recipe_text, self.overwrite, self._rewritten = Path(path), recipe_text, overwrite, rewritten

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check(self) -> None:
        """Raise UserError if the folder cannot be used. Reads only, so that a refusal leaves nothing behind."""
        check_folder(self.path)
        if self.overwrite or not self.path.is_dir() or not _visible(self.path):
            return
        recipe = self / "recipe.yaml"
        if not recipe.is_file():
            raise UserError(f"{self.path} is not empty and holds no run. Choose another --out, or give --overwrite to write into it.")
        how = "Choose another --out, or give --overwrite to delete that run and start anew."
        try:
            held = self._rewritten(recipe.read_text(encoding="utf-8"))
            changes = _changed(held, self.recipe_text) if held != self.recipe_text else []
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{recipe} is damaged ({first_line(error)}), so it is not known whose run this is. {how}") from None
        if changes:
            raise UserError(f"{self.path} holds a run of a different recipe (differs in: {', '.join(changes)}). {how}")

    def __enter__(self) -> "RunFolder":
        self.check()
        if not MAIN:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self / _LOCK, "a+")  # held until __exit__; the kernel lets go of it when a process is killed
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.path} is in use by another run that is still going. Wait for it, or choose another --out.") from None
        if self.overwrite:
            for name in ENTRIES:
                remove(self / name)
        try:
            write_text(self / "recipe.yaml", self.recipe_text)
        except OSError:
            self._leave()
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        if not MAIN:
            return
        if kind is not None and issubclass(kind, UserError | OSError) and _visible(self.path) == ["recipe.yaml"]:
            remove(self / "recipe.yaml")  # refused before any work was done: leave no trace
        self._leave()

    def _leave(self) -> None:
        """Let go of the lock, and of the folder if nothing is in it."""
        if not _visible(self.path):
            remove(self / _LOCK)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self._lock.close()

    def read(self, name: str, make: Callable[[Any], Any]) -> Any | None:
        """The JSON of an entry as `make` has it, or None if it is not there yet (entries appear whole or not at all)."""
        return read_json(self / name, make)

    def write(self, name: str, value: Any) -> None:
        """Write an entry as JSON, whole or not at all."""
        if MAIN:
            write_text(self / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_folder(path: Path) -> None:
    """UserError when `path`, or what it would lie in, is a file. Reads only."""
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{there} is a file where a folder is needed. Choose another place to write to.")


def check_apart(path: Path, *inputs: str | Path | None) -> None:
    """UserError when one of `inputs` is `path` or lies inside it: what is read must not be where a run writes and deletes."""
    for given in inputs:
        if given is not None and Path(given).exists() and Path(given).resolve().is_relative_to(path.resolve()):
            raise UserError(f"{given} is read and lies in {path}, which is written. Choose another --out, or copy {given} elsewhere first.")


def read_json(path: Path, make: Callable[[Any], Any], how: str = "Delete it; the command that wrote it makes it anew.") -> Any | None:
    """make(what a JSON file holds), or None if there is no such file. UserError that names it, and says `how` to go on, when it is damaged."""
    if not path.is_file():
        return None
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}). {how}") from None


def mapping(value: Any) -> dict[str, Any]:
    """`value`, if it is a JSON object; ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where a mapping should be")
    return value


def as_scores(value: Any) -> dict[int, list[float]]:
    """What selection.json holds: {layer: a score per head}."""
    found = {int(layer): [float(score) for score in heads] for layer, heads in mapping(value).items()}
    if not found:
        raise ValueError("it holds no scores")
    return found


def as_rows(value: Any) -> list[dict[str, Any]]:
    """What results.json holds: rows as evals/rows.py makes them."""
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} where a list of rows should be")
    for row in value:
        if lacking := [key for key in ("model", "metric", "setting", "value", "ratio") if key not in mapping(row)]:
            raise ValueError(f"a row without {', '.join(lacking)}")
    return value


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: temporary sibling, fsync, rename. On a full disk the old file stays and the temporary one goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the temporary name says nothing to a reader
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _visible(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def _changed(old: str, new: str) -> list[str]:
    """Top-level keys in which two resolved recipes differ. ValueError or YAMLError when `old` is none."""
    before, after = mapping(yaml.safe_load(old)), yaml.safe_load(new)
    return [key for key in {**before, **after} if before.get(key) != after.get(key)] or ["formatting"]
