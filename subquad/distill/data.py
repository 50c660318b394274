"""Text sources -> documents -> one array of token ids -> batches that are a pure function of (seed, step).

That is why resuming needs no loader state.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subquad.errors import UserError, raise_all
from subquad.settings import expand

Source = str | Path | Sequence["Source"]

SUFFIXES = (".txt", ".md", ".jsonl")
# A JSON line's text: the first row whose fields are all there, joined by a newline. Multiple choice rows have choices and gold (an index).
FIELDS = (("text",), ("question", "answer"), ("prompt", "completion"), ("instruction", "output"), ("query", "answer"), ("query",))
ADVICE = (
    "A data source is 'pydoc', a text file, a folder, a .jsonl file, or a dataset as name:split:field. A recipe takes others by "
    "--set data.train=... and --set data.eval=...; the shipped ones look in $SUBQUAD_DATA/corpus."
)
_HUB_NAME = re.compile(r"[\w./-]+(:[\w.-]+){2,3}")


@dataclass(frozen=True)
class Document:
    """One text that stands alone. `name` says where it is from: 'novel.txt', 'train.jsonl:12', 'pydoc:assert'."""

    name: str
    text: str


def load_documents(source: Source) -> list[Document]:
    """Documents of a source, in a fixed order:

    'pydoc'                the topics of Python's own pydoc_data, sorted
    a .txt or .md file     one document
    a .jsonl file          one document a line: text | question + answer | prompt + completion | instruction + output | query
    a folder               its *.txt, *.md, *.jsonl, sorted by name
    'name:split:field'     a dataset for datasets.load_dataset ('name:config:split:field' with a configuration)
    a list                 all of them

    ${VAR} and ${VAR:-default} are expanded. Raises UserError for everything that is missing or unreadable, all at once.
    """
    documents, problems, missing = [], [], False
    for name in _flat(source):
        try:
            found = _load(expand(name))
        except UserError as error:
            problems += error.problems
            continue
        if found is None:
            missing = True
            problems.append(f"No such file or folder: {expand(name)}.")
        documents += found or []
    if missing:
        problems[-1] += f" {ADVICE}"
    raise_all(problems)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"The source {source!r} holds no text.")
    return documents


def _flat(source: Source) -> list[str]:
    if isinstance(source, str | Path):
        return [str(source)]
    if not isinstance(source, list | tuple):
        raise UserError(f"A data source is a name, a path or a list of them, got {source!r}.")
    return [name for part in source for name in _flat(part)]


def _load(name: str) -> list[Document] | None:
    """None where there is nothing of that name."""
    path = Path(name).expanduser()
    if name == "pydoc":
        return _pydoc()
    if os.path.isdir(path):  # no error for a text in the place of a name, which is too long for one
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"The folder {name} holds no {', '.join(SUFFIXES)} file.")
        return [document for file in files for document in _file(file)]
    if os.path.isfile(path):
        return _file(path)
    if _HUB_NAME.fullmatch(name):
        return _dataset(*name.split(":"))
    return None


def _pydoc() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"pydoc:{topic}", topics[topic]) for topic in sorted(topics)]


def _file(path: Path) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path} as UTF-8 text: {getattr(error, 'strerror', None) or error}.") from None
    if path.suffix != ".jsonl":
        return [Document(path.name, text)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [Document(f"{path.name}:{number}", _row_text(path, number, line)) for number, line in lines]


def _row_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON: {error}.") from None
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("choices"), list) and isinstance(row.get("gold"), int):
        row["answer"] = row["choices"][row["gold"]]
    for fields in FIELDS:
        if all(isinstance(row.get(field), str) for field in fields):
            return "\n".join(row[field] for field in fields)
    known = " | ".join(" + ".join(fields) for fields in FIELDS)
    raise UserError(f"{path}, line {number}: no text found. Fields here: {', '.join(row) or 'none'}. Understood: {known}.")


def _dataset(name: str, *rest: str) -> list[Document]:
    *config, split, field = rest
    try:
        import datasets
    except ImportError:
        raise UserError(f"The data source {name} is a dataset, which needs the package datasets: pip install 'subquad[train]'.") from None
    try:
        rows = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # the library raises its own, the hub client's and plain OSErrors; each says what is wrong with the name
        raise UserError(f"Cannot load the dataset {name!r}, split {split!r}: {error}") from error
    if field not in rows.column_names:
        raise UserError(f"The dataset {name!r} has no field {field!r}. Fields: {', '.join(rows.column_names)}.")
    return [Document(f"{name}:{split}:{index}", str(text)) for index, text in enumerate(rows[field])]


def hold_out(documents: Sequence[Document], share: float = 0.1) -> tuple[list[Document], list[Document]]:
    """(train, held out): whole documents from the end, about `share` of the characters, at least one.

    The last document is cut, at a line break where there is one, when it is the only one or more than twice the share by itself.
    """
    target = share * sum(len(document.text) for document in documents)
    last = documents[-1]
    if len(documents) == 1 or len(last.text) > 2 * target:
        cut = int(len(last.text) - target)
        cut = last.text.rfind("\n", cut // 2, cut) + 1 or cut
        halves = Document(last.name, last.text[:cut]), Document(last.name + " (end)", last.text[cut:])
        return [*documents[:-1], halves[0]], [halves[1]]
    first, held = len(documents) - 1, len(last.text)
    while first > 1 and held + len(documents[first - 1].text) / 2 <= target:  # stop where the next document would lead further away
        first -= 1
        held += len(documents[first].text)
    return list(documents[:first]), list(documents[first:])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of all documents in one int32 array [N], an end-of-text token between two documents (when the tokenizer has one)."""

    ids: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[Document], tokenizer: Any) -> "Tokens":
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        parts: list[np.ndarray] = []
        for start in range(0, len(documents), 1000):  # by thousands: a batch is tokenized in parallel, its Python lists are freed
            texts = [document.text for document in documents[start : start + 1000]]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            parts += [np.array([*ids, *end], dtype=np.int32) for ids in encoded]
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return cls(ids[: len(ids) - len(end)])

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids, little endian: says whether two runs saw the same text through the same tokenizer."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()

    def shortage(self, context: int) -> list[str]:
        """What is wrong with cutting this text into sequences of `context` tokens."""
        if len(self) >= context:
            return []
        return [f"The text has {len(self):,} tokens, less than one context of {context:,}. Give more text or lower context."]

    def long(self) -> torch.Tensor:
        """The ids as a LongTensor [N]."""
        return torch.from_numpy(self.ids.astype(np.int64))


class Batches:
    """`batches[step]` -> LongTensor [batch, context], a pure function of (tokens, seed, step).

    The text is cut into blocks of `context` tokens; every epoch goes through all of them once, in its own random order. A share `repeat` of
    the sequences, spread evenly, is the first half of its block twice: text in which looking back further than a window pays.
    """

    def __init__(self, tokens: Tokens, context: int, batch: int, repeat: float = 0.0, seed: int = 0):
        raise_all(tokens.shortage(context))
        assert not (repeat and context % 2), "a repeated passage needs an even context"
        self.tokens, self.context, self.batch, self.repeat, self.seed = tokens, context, batch, repeat, seed
        self.blocks = len(tokens) // context
        self._epoch, self._order = -1, torch.empty(0)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the batches depend on, as JSON."""
        return {"tokens": self.tokens.sha256, "context": self.context, "batch": self.batch, "repeat": self.repeat, "seed": self.seed}

    def __getitem__(self, step: int) -> torch.Tensor:
        rows = [self._sequence(step * self.batch + row) for row in range(self.batch)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _sequence(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.blocks)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.blocks, generator=generator)
        start = int(self._order[position]) * self.context
        block = self.tokens.ids[start : start + self.context]
        if int((index + 1) * self.repeat) > int(index * self.repeat):
            half = block[: self.context // 2]
            return np.concatenate([half, half])
        return block


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on every part, alike on all machines (Python's own hash() of a string is not)."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little") >> 1
