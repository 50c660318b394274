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

from subquad.errors import UserError

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
        held = self._rewritten(recipe.read_text(encoding="utf-8"))
        if held != self.recipe_text:
            changes = ", ".join(_changed(held, self.recipe_text))
            raise UserError(
                f"{self.path} holds a run of a different recipe (differs in: {changes}). "
                "Choose another --out, or give --overwrite to delete that run and start anew."
            )

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

    def read(self, name: str) -> Any | None:
        """The JSON of an entry, or None if it is not there yet (entries appear whole or not at all)."""
        path = self / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

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


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: temporary sibling, fsync, rename. On a full disk the old file stays and the temporary one goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    """Top-level keys in which two resolved recipes differ."""
    try:
        before, after = yaml.safe_load(old) or {}, yaml.safe_load(new)
        return [key for key in {**before, **after} if before.get(key) != after.get(key)] or ["formatting"]
    except yaml.YAMLError:
        return ["recipe.yaml is damaged"]
