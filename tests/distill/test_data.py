import sys
import types
from pathlib import Path

import numpy as np
import pytest

from subquad.distill.data import Batches, Document, Tokens, derive_seed, hold_out, load_documents
from subquad.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.md").write_text("ay")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"question": "q", "answer": "a"}\n{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "d.jsonl").write_text('{"query": "2+2=", "choices": ["3", "4"], "gold": 1}\n{"query": "only"}\n')
    (tmp_path / "ignored.csv").write_text("x")
    return tmp_path


FOLDER = ["ay", "bee", "one", "q\na", "p\nc", "2+2=\n4", "only"]


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("{}/b.txt", ["bee"]),
        (Path("{}/b.txt"), ["bee"]),
        ("{}", FOLDER),
        (["{}/b.txt", ["{}/a.md"]], ["bee", "ay"]),
        ("${{CORPUS}}/a.md", ["ay"]),
        ("${{NOT_THERE:-{}}}/a.md", ["ay"]),
    ],
)
def test_sources(corpus, monkeypatch, source, texts):
    monkeypatch.setenv("CORPUS", str(corpus))

    def fill(part):
        return type(part)(str(part).format(corpus)) if isinstance(part, str | Path) else [fill(each) for each in part]

    assert [document.text for document in load_documents(fill(source))] == texts


def test_pydoc_topics_are_sorted():
    names = [document.name for document in load_documents("pydoc")]
    assert len(names) > 50 and names == sorted(names) and names[0].startswith("pydoc:")


def test_dataset(monkeypatch):
    class Rows(dict):
        column_names = ("text",)

    def load_dataset(name, *config, split):
        assert (name, config, split) == ("some/set", ("small",), "train")
        return Rows(text=["a", "b"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [document.text for document in load_documents("some/set:small:train:text")] == ["a", "b"]
    with pytest.raises(UserError, match=r"no field 'body'\. Fields: text"):
        load_documents("some/set:small:train:body")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "No such file or folder"),
        ("bad.jsonl", "{", "line 1: not JSON"),
        ("bad.jsonl", '{"text": "a"}\n{"body": "b"}', "line 2: no text found. Fields here: body"),
        ("bad.jsonl", "[1]", "Fields here: none"),
        ("empty.txt", " \n", "holds no text"),
        ("latin.txt", b"\xff\xfe\xfa", "as UTF-8"),
    ],
)
def test_bad_sources(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        load_documents(str(tmp_path / name))


def test_all_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load_documents([f"{tmp_path}/one.txt", f"{tmp_path}/two.txt", "${SUBQUAD_UNSET}/three.txt"])
    assert len(caught.value.problems) == 3
    assert [problem.count("--set data.train") for problem in caught.value.problems] == [0, 0, 1], "what to do is said once"
    assert "SUBQUAD_DATA/corpus" in caught.value.problems[-1]


@pytest.mark.parametrize(
    ("lengths", "share", "train", "held"),
    [
        ([10] * 10, 0.1, [10] * 9, [10]),
        ([10] * 10, 0.3, [10] * 7, [10, 10, 10]),
        ([100], 0.1, [90], [10]),
        ([50, 100], 0.1, [50, 85], [15]),  # the last one is far more than the share: cut
        ([98, 1, 1], 0.1, [98], [1, 1]),
        ([1, 1], 0.9, [1], [1]),
    ],
)
def test_hold_out(lengths, share, train, held):
    documents = [Document(str(index), "x" * length) for index, length in enumerate(lengths)]
    assert [[len(document.text) for document in part] for part in hold_out(documents, share)] == [train, held]


def test_hold_out_cuts_at_a_line_break():
    train, held = hold_out([Document("a", "line\n" * 20)], 0.1)
    assert train[0].text.endswith("\n") and held[0].text.startswith("line") and train[0].text + held[0].text == "line\n" * 20


class Letters:
    """A tokenizer: one id a letter."""

    def __init__(self, eos=0):
        self.eos_token_id = eos

    def __call__(self, texts, **settings):
        assert settings["add_special_tokens"] is False
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}


def test_tokens():
    documents = [Document("1", "ab"), Document("2", "c")]
    tokens = Tokens.from_documents(documents, Letters())
    assert tokens.ids.tolist() == [1, 2, 0, 3] and tokens.ids.dtype == np.int32 and tokens.long().tolist() == [1, 2, 0, 3]
    assert Tokens.from_documents(documents, Letters(eos=None)).ids.tolist() == [1, 2, 3]
    assert tokens.sha256 != Tokens(tokens.ids[:3]).sha256


def numbers(count):
    return Tokens(np.arange(count, dtype=np.int32))


def test_batches_are_a_function_of_seed_and_step():
    first, second = (Batches(numbers(103), 10, 3, repeat=0.5, seed=7) for _ in range(2))
    forward = [first[step] for step in range(12)]
    for step in (11, 0, 5, 5, 3):
        assert second[step].equal(forward[step])
    assert not Batches(numbers(103), 10, 3, repeat=0.5, seed=8)[0].equal(forward[0])
    assert forward[0].shape == (3, 10) and forward[0].dtype.is_signed


def test_an_epoch_is_every_block_once():
    batches = Batches(numbers(103), 10, 2)
    epochs = [[tuple(batches[step][row].tolist()) for step in range(start, start + 5) for row in range(2)] for start in (0, 5)]
    assert all(sorted(epoch) == [tuple(range(start, start + 10)) for start in range(0, 100, 10)] for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("repeat", "expected"), [(0.0, 0), (0.25, 10), (0.5, 20), (1.0, 40)])
def test_repeat_is_an_exact_share(repeat, expected):
    batches = Batches(numbers(100), 10, 1, repeat=repeat)
    rows = [batches[step][0] for step in range(40)]
    assert sum(row[:5].equal(row[5:]) for row in rows) == expected


def test_too_little_text():
    with pytest.raises(UserError, match="9 tokens, less than one context of 10"):
        Batches(numbers(9), 10, 1)


def test_seeds_do_not_depend_on_the_process():
    assert derive_seed(0, "epoch", 1) == 3870587237582191730
