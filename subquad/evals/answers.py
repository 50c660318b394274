"""What models have answered so far, kept in a file, so that a stopped eval goes on where it was; and the score of every item, for comparing runs.

A folder holds answers.jsonl (one line per question asked), items.json (scores by metric, setting and model) and results.json (the rows). A line
that a kill or a full disk cut short is dropped when the file is opened again. Answers belong to a model's exact weights: `fingerprint`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.evals.rows import Row

FILE = "answers.jsonl"


class Answers:
    """Without a folder everything stays in memory. `log` is called with a line of progress now and then."""

    def __init__(self, folder: Path | None = None, log: Callable[[str], None] | None = None):
        self.log = log or (lambda line: None)
        self.items: dict[str, dict[str, dict[str, list[float]]]] = {}  # metric -> setting -> model -> score of every item
        self._known: dict[str, Any] = {}
        self._marks: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(folder / FILE)

    def _open(self, path: Path) -> None:
        # Unbuffered: on a full disk nothing is left in a buffer that would fail once more when the process ends.
        self._file = open(path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the kernel however the process ends
            self._file.truncate(self._read(path))
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path.parent} is in use by another eval that is still going. Wait for it, or choose another --out.") from None
        except UserError:
            self._file.close()
            raise

    def _read(self, path: Path) -> int:
        """Bytes of complete lines."""
        whole = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key, value = json.loads(line)
                except ValueError:
                    raise UserError(f"{path}, line {number}: damaged. Delete that line, or choose another --out.") from None
                self._known[key] = value
                whole += len(line)
        return whole

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def put(self, answers: dict[str, Any]) -> None:
        """Remember, and write at once: what a batch has answered survives a kill from here on."""
        self._known |= answers
        if self._file is not None:
            data = "".join(json.dumps(pair) + "\n" for pair in answers.items()).encode()
            while data:
                data = data[self._file.write(data) :]

    def mark(self, model: PreTrainedModel) -> str:
        """The model's fingerprint, taken once: weights must not change while these answers are open."""
        if model not in self._marks:
            self._marks[model] = fingerprint(model)
        return self._marks[model]

    def remember(self, key: str, run: Callable[[], list[Row]]) -> list[Row]:
        """run()'s rows and the scores it noted, or those kept under `key`."""
        known = self.get(key)
        if known is None:
            before, self.items = self.items, {}
            try:
                rows = run()
                known = {"rows": rows, "items": self.items}
            finally:
                self.items = before
            self.put({key: known})
        for metric, settings in known["items"].items():
            for setting, models in settings.items():
                for model, scores in models.items():
                    self.note(metric, setting, model, scores)
        return known["rows"]

    def note(self, metric: str, setting: str, model: str, scores: list[float]) -> None:
        self.items.setdefault(metric, {}).setdefault(setting, {})[model] = scores

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def key(*parts: Any) -> str:
    """96 bits that stand for JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a model's weights and plan (16 hex digits). About a second for 135M fp32 parameters.

    It is the same for a student inside and outside `as_teacher`: keep such models apart by name.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    plan = getattr(model, "subquad_plan", None)
    digest.update(json.dumps(plan.to_dict() if plan is not None else None, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
