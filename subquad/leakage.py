"""Leakage guard: does text to be judged on stand in the text that was trained on? Hashes of both, and runs of 13 equal words between them.

13 words is what GPT-3 and most benchmarks since count as overlap: long enough that chance does not make it, short enough to survive reformatting.
Words are lower-case runs of letters and digits, so that markup and punctuation do not hide a copy.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from subquad.distill.data import Document, load_documents
from subquad.errors import UserError, raise_all
from subquad.evals.local import find, stem, texts

WORDS, LEAST = 13, 8
# Share of an evaluation set's 13-grams that may stand in the training text. Two novels of one library share its licence: 3.8 % of Frankenstein's
# runs stand in Dracula's file. Python's help topics, which repeat each other's paragraphs, are at 8.9 % between the last tenth and the rest.
ALLOWED = 0.05
_WORD = re.compile(r"[^\W_]+")


def grams(text: str) -> list[int]:
    """64-bit hashes of every run of 13 words; of the whole text, if it is shorter and has at least LEAST."""
    words = _words(text)
    return _runs(words, _size(words))


def overlap(train: Iterable[str], sets: dict[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each evaluation set: name, sha256, items, items with a common 13-gram, and `share` of its 13-grams that stand in `train`.

    A text shorter than 13 words is compared with the training text's runs of its own length.
    """
    of = {name: [grams(text) for text in items] for name, items in sets.items()}
    wanted = {gram for items in of.values() for item in items for gram in item}
    sizes = {_size(_words(text)) for items in sets.values() for text in items}
    hits: set[int] = set()
    for text in train:
        words = _words(text)
        for size in sizes:
            hits.update(wanted.intersection(_runs(words, size)))
    found = []
    for name, items in of.items():
        total = sum(map(len, items))
        common = sum(gram in hits for item in items for gram in item)
        found.append({
            "set": name, "sha256": sha256(sets[name]), "items": len(items), "overlapping_items": sum(any(g in hits for g in i) for i in items),
            "share": common / total if total else 0.0,
        })  # fmt: skip
    return found


def eval_sets(tasks: dict[str, dict[str, Any]], held_out: Sequence[Document] = ()) -> dict[str, list[str]]:
    """Every text a choice of tasks would show a model, by the name of its set."""
    sets = {"held-out text": [document.text for document in held_out]} if held_out else {}
    for task, settings in tasks.items():
        for path in find(task, settings["files"]) if settings.get("files") else ():
            name = stem(path)
            sets[name if path.parent.name != "blimp" else f"blimp {name}"] = texts(path)
    return sets


def guard(train: Sequence[Document], held_out: Sequence[Document], tasks: dict[str, dict[str, Any]], allow: bool) -> list[dict[str, Any]]:
    """What overlaps; UserError for every set with more than ALLOWED, unless `allow`."""
    found = overlap((document.text for document in train), eval_sets(tasks, held_out))
    if not allow:
        raise_all([
            f"{entry['share']:.1%} of the runs of {WORDS} words in {entry['set']} ({entry['overlapping_items']} of {entry['items']} texts) stand in the "
            "training text, so its numbers would say nothing. Take that text out of data.train, evaluate on another, or set data.allow_overlap=true."
            for entry in found if entry["share"] > ALLOWED
        ])  # fmt: skip
    return found


def overlap_of(story: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Overlap of the files of `tasks` with the text a student was trained on, as its provenance names it; None where that cannot be read."""
    source = story.get("recipe", {}).get("data", {}).get("train") if isinstance(story.get("recipe"), dict) else None
    sets = eval_sets(tasks)
    if source is None or not sets:
        return None
    try:
        return overlap((document.text for document in load_documents(source)), sets)
    except UserError:
        return None


def sha256(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _size(words: list[str]) -> int:
    """Words of a run: WORDS, or all of a shorter text."""
    return min(WORDS, len(words))


def _runs(words: list[str], size: int) -> list[int]:
    """Hashes of every run of `size` words; none for sizes that chance would match."""
    return [_hash(" ".join(words[at : at + size])) for at in range(len(words) - size + 1)] if size >= LEAST else []


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
