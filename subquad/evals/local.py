"""Evaluation files on disk: what they may look like, read with every broken line named.

kind      a line, or a file; the kind is also the name of the task that asks it
choice    JSON lines {"query": text, "choices": [text, ...], "gold": index}
pairs     JSON lines {"sentence_good": text, "sentence_bad": text} (BLiMP)
gsm8k     JSON lines {"question": text, "answer": "... #### number"}
mmlu      csv with the columns question, choice0 .. choice3, answer (index or letter); a header line may be missing
rolling   anything else that ends in .txt or .md: one document

Files may be gzipped. Nothing is downloaded.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subquad.errors import UserError, raise_all
from subquad.evals.text import whole

SHOWN = 5  # broken lines named one by one; the rest are counted
FIELDS = {"choice": ("query", "choices", "gold"), "pairs": ("sentence_good", "sentence_bad"), "gsm8k": ("question", "answer")}
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".txt", ".md")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Choice:
    """A question with its choices; gold: index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Problem:
    """A word problem; number: what comes after '####'."""

    question: str
    answer: str
    number: str


@dataclass(frozen=True)
class File:
    """What one file holds: all items, and the first `limit` of them, which are asked."""

    name: str
    every: list
    asked: list


def read(kind: str, names: str | Sequence[str], limit: int | None = None) -> list[File]:
    """The files of `names`, read as `kind`."""
    found = [(path, READERS[kind](path)) for path in find(kind, names)]
    return [File(stem(path), every, limited(kind, every, limit)) for path, every in found]


def find(kind: str, names: str | Sequence[str]) -> list[Path]:
    """Files of `names`; a folder stands for its files, sorted. UserError names all that are not there."""
    listed = [names] if isinstance(names, str) else list(names or ())
    if not listed:
        raise UserError(f"{kind}.files: give at least one file.")
    paths = [Path(name).expanduser() for name in listed]
    raise_all([f"{kind}.files: no file {name!r}. Give a path." for name, path in zip(listed, paths, strict=True) if not path.exists()])
    return [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]


def _inside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))


def stem(path: Path) -> str:
    """The name without its suffixes."""
    return re.sub(r"\.(jsonl|csv|txt|md)(\.gz)?$", "", path.name)


def kind_of(path: Path) -> str:
    """The row of the table above that a file is, judged by its name and its first line."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".txt", ".md")):
        return "mmlu" if name.endswith(".csv") else "rolling"
    first = next((line for line in read_text(path).split("\n") if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        raise UserError(f"{path}, line 1: not JSON. Understood: {_understood()}.") from None
    for kind, fields in FIELDS.items():
        if isinstance(row, dict) and all(field in row for field in fields):
            return kind
    raise UserError(f"{path}, line 1: fields {', '.join(row) if isinstance(row, dict) else 'none'}. Understood: {_understood()}.")


def read_choice(path: Path) -> list[Choice]:
    def check(row: dict[str, Any]) -> Choice | str:
        query, choices, gold = (row.get(field) for field in FIELDS["choice"])
        if (
            not isinstance(query, str)
            or not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(c, str) and c for c in choices)
        ):
            return "expected query (text) and choices (at least two texts)"
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            return f"gold {gold!r} is not an index of its {len(choices)} choices"
        return Choice(query, tuple(choices), gold)

    return _lines(path, check)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    def check(row: dict[str, Any]) -> tuple[str, str] | str:
        pair = tuple(row.get(field) for field in FIELDS["pairs"])
        return pair if all(isinstance(text, str) and text for text in pair) else "expected sentence_good and sentence_bad (texts)"

    return _lines(path, check)


def read_gsm8k(path: Path) -> list[Problem]:
    def check(row: dict[str, Any]) -> Problem | str:
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            return "expected question (text) and answer (text with '#### number')"
        return Problem(question, answer, answer.rpartition("####")[2].strip().replace(",", ""))

    return _lines(path, check)


def read_mmlu(path: Path) -> list[Choice]:
    items, broken = [], []
    for number, cells in enumerate(csv.reader(io.StringIO(read_text(path))), 1):
        if not cells or (number == 1 and cells[-1].strip().lower() == "answer"):
            continue
        answer = cells[-1].strip()
        gold = LETTERS.find(answer.upper()) if answer.isalpha() else int(answer) if answer.isdigit() else -1
        if len(cells) != 6 or not 0 <= gold < 4:
            broken.append(
                (number, f"expected question, four choices and an answer 0-3 or A-D, got {len(cells)} cells ending in {answer!r}")
            )
        else:
            items.append(Choice(cells[0], tuple(cells[1:5]), gold))
    return _whole(path, items, broken)


READERS = {"choice": read_choice, "pairs": read_pairs, "gsm8k": read_gsm8k, "mmlu": read_mmlu}


def texts(path: Path) -> list[str]:
    """Everything a file would show a model, one text per item: what leakage is looked for in."""
    kind = kind_of(path)
    if kind == "rolling":
        return [read_text(path)]
    items = READERS[kind](path)
    if kind in ("choice", "mmlu"):
        return [" ".join((item.query, item.choices[item.gold])) for item in items]
    return [item[0] if kind == "pairs" else f"{item.question} {item.answer}" for item in items]


def limited(kind: str, items: list, limit: int | None) -> list:
    """The first `limit` items, as lm-evaluation-harness takes them; all for None."""
    if limit is None:
        return items
    if limit == 0:
        raise UserError(f"{kind}.limit: 0 leaves no items to measure; give at least 1, or leave it out for all {len(items)}.")
    return items[: whole(f"{kind}.limit", limit, least=1)]


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path} as UTF-8 text: {getattr(error, 'strerror', None) or error}.") from None


def _lines(path: Path, check) -> list:
    """check(row) returns an item, or what is wrong with it."""
    items, broken = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            broken.append((number, f"not JSON: {error}"))
            continue
        item = check(row) if isinstance(row, dict) else "not an object"
        broken.append((number, item)) if isinstance(item, str) else items.append(item)
    return _whole(path, items, broken)


def _whole(path: Path, items: list, broken: list[tuple[int, str]]) -> list:
    if broken:
        told = [f"{path}, line {number}: {reason}." for number, reason in broken[:SHOWN]]
        more = len(broken) - SHOWN
        raise UserError(*told, *([f"{path}: {more} more broken lines."] if more > 0 else []))
    if not items:
        raise UserError(f"{path} holds no items.")
    return items


def _understood() -> str:
    return "; ".join(f"{kind} ({', '.join(fields)})" for kind, fields in FIELDS.items())
