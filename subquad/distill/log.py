"""The training log: JSON lines, one row a step, that can be taken back to a checkpoint's step.

What depends on the clock stands in TIME_KEYS and nowhere else: without them two runs of one recipe are equal bit for bit.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subquad.errors import UserError

LAYER = "layer "  # with its index: the key of one layer's loss in a layer-local stage
TIME_KEYS = ("time", "tokens_per_second")


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the keys that depend on the clock."""
    return {key: value for key, value in row.items() if key not in TIME_KEYS}


class JsonLog:
    """Appends rows to a file. `write` and `rewind` are what run_stage takes as `log` and `rewind`."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is in the file when this returns. A full disk is a UserError."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write the log {self.path}: {error.strerror}.") from error

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line torn by a kill is left out. UserError for any other line that is no row."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._row(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}, line {number}: damaged. Delete that line, then call again what you called.")
        return row

    def rewind(self, stage: str, step: int) -> None:
        """Drop rows of `stage` after `step` (a resumed run writes them again) and a torn last line. Replaced as one unit."""
        if not self.path.exists():
            return
        kept = [row for row in self.rows() if not (row.get("stage") == stage and row.get("step", 0) > step)]
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"Cannot write the log {self.path}: {error.strerror}.") from error
