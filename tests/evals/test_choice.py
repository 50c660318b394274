"""Files of questions: what is read, what is refused, what is scored, and that a stopped eval goes on with the same numbers."""

import gzip
import json

import helpers
import numpy as np
import pytest
import torch

from subquad.errors import UserError
from subquad.evals import choice, evaluate, local
from subquad.evals.answers import Answers
from subquad.evals.generation import repetition, right
from subquad.evals.local import Choice, Problem
from subquad.evals.models import loaded
from subquad.evals.paired import difference, paired_rows, recovery, solvable, stderr
from subquad.evals.requests import Request, cut, encode_pair, rolling_requests, score
from subquad.evals.rolling import rolling
from subquad.evals.suites import named, suite, with_files

TOKENS = torch.arange(100)
ITEMS = [
    {"query": "Question: what is wet?", "choices": ["a stone", "rain", "the letter t"], "gold": 1},
    {"query": "The cup fell, therefore", "choices": ["it broke.", "it sang a long song."], "gold": 0},
    {"query": "Question: what is up?", "choices": ["the sky", "the floor"], "gold": 0},
]


@pytest.fixture
def tokenizer():
    return helpers.tiny_tokenizer()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    return path


def two_models():
    return loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(seed=1))


def logprob(model, tokenizer, context, continuation):
    """Plain: one sequence, whole logits, fp64."""
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(scores[at - 1, ids[at]].item() for at in range(start, len(ids)))


def test_accuracy_against_its_definition(file, tokenizer):
    rows = choice.choice(two_models(), TOKENS, tokenizer=tokenizer, answers=(answers := Answers()), files=[str(file)])
    for name, seed in (("teacher", 0), ("student", 1)):
        model, raw, norm = helpers.tiny_model(seed=seed), [], []
        for item in ITEMS:
            query = item["query"] + ("\nAnswer:" if item["query"].startswith("Question:") else "")
            scores = np.array([logprob(model, tokenizer, query, f" {text}") for text in item["choices"]])
            raw.append(float(scores.argmax() == item["gold"]))
            norm.append(float((scores / [len(text) for text in item["choices"]]).argmax() == item["gold"]))
        setting = "quiz, 3 of 3 items, 0-shot"
        assert answers.items["accuracy"][setting][name] == raw
        assert answers.items["accuracy_norm"][setting][name] == norm
        row = next(row for row in rows if (row["model"], row["metric"]) == (name, "accuracy"))
        assert row["value"] == pytest.approx(np.mean(raw)) and row["n"] == 3 and row["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_padding_and_batches_change_nothing(which, tokenizer):
    """Rows of many lengths in one batch, one by one, and the plain definition."""
    from subquad.linearize import linearize, plan

    model = helpers.tiny_model()
    if which == "student":
        model = linearize(model, plan(model, mixer="gated_delta", window=4, sinks=1, exact={1: [0]}))
    contexts = ["a", "a longer one with words", "mid size text", "x" * 40]
    pairs = [(context, f" {end}") for context in contexts for end in ("yes", "not at all")]
    requests = [Request((*a, *b), ((len(a), len(a) + len(b)),)) for a, b in (encode_pair(tokenizer, *pair) for pair in pairs)]
    together = score("m", loaded(m=model)["m"], requests, Answers(), batch_tokens=10_000)
    alone = score("m", loaded(m=model)["m"], requests, Answers(), batch_tokens=1)
    for (a,), (b,), pair in zip(together, alone, pairs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and a.greedy == b.greedy
        assert a.logprob == pytest.approx(logprob(model, tokenizer, *pair), abs=1e-4)


def test_stopped_and_started_again(file, tokenizer, tmp_path, monkeypatch):
    """A kill after the first batch, half a line written; then nothing is asked twice and the numbers are those of an unbroken run."""
    tasks = {"choice": {"files": [str(file)]}}

    def run(answers):
        handed = {"tokenizer": tokenizer, "answers": answers}
        return evaluate(two_models(), TOKENS, {name: {**handed, **settings} for name, settings in tasks.items()})

    monkeypatch.setattr("subquad.evals.requests.score.__defaults__", (60,))
    monkeypatch.setattr("subquad.evals.choice.score_all", lambda m, r, a: {n: score(n, o, r, a, 60) for n, o in m.items()})
    whole = run(Answers())
    answers, put, calls = Answers(tmp_path), Answers.put, []

    def put_then_die(self, found):
        put(self, found)
        calls.append(len(found))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "put", put_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(answers)
    answers.close()
    monkeypatch.setattr(Answers, "put", put)
    with open(tmp_path / "answers.jsonl", "a") as torn:
        torn.write('["half a li')
    again = Answers(tmp_path)
    assert len(again) == sum(calls)
    assert run(again) == whole
    with pytest.raises(UserError, match="in use by another eval"):
        Answers(tmp_path)
    again.close()
    assert len(Answers(tmp_path)) > sum(calls)


def test_pairs_and_mmlu_files(tokenizer, tmp_path):
    blimp = tmp_path / "blimp"
    blimp.mkdir()
    for name in ("one", "two"):
        lines = "".join(
            json.dumps({"sentence_good": f"The {w} sits.", "sentence_bad": f"The {w} sit."}) + "\n" for w in ("cat", "dog", "hen")
        )
        (blimp / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = choice.pairs(two_models(), TOKENS, tokenizer=tokenizer, answers=Answers(), files=str(blimp), limit=2)
    assert rows[0]["setting"] == "BLiMP, 2 paradigms, 4 of 6 pairs" and {row["metric"] for row in rows} == {
        "accuracy",
        "accuracy_by_paradigm",
    }
    csv = tmp_path / "logic_dev.csv"
    csv.write_text('question,choice0,choice1,choice2,choice3,answer\nIs it?,yes,no,"a, b",d,2\nWas it?,w,x,y,z,A\n')
    assert local.read_mmlu(csv) == [Choice("Is it?", ("yes", "no", "a, b", "d"), 2), Choice("Was it?", ("w", "x", "y", "z"), 0)]
    rows = choice.mmlu(two_models(), TOKENS, tokenizer=tokenizer, answers=Answers(), files=[str(csv)], shots=1)
    assert [row["metric"] for row in rows] == ["accuracy", "accuracy", "option_bias", "option_bias"]
    assert choice.bias([0, 1, 2, 3], [0, 0, 0, 0]) == 0.75 and choice.bias([0, 1], [1, 0]) == 0


BAD = {
    "not json": ('{"query": "a"', "line 3: not JSON"),
    "no choices": ('{"query": "a", "choices": ["b"], "gold": 0}', "line 3: expected query"),
    "gold outside": ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 3: gold 2 is not an index of its 2 choices"),
}


@pytest.mark.parametrize("what", BAD)
def test_broken_lines_are_named(tmp_path, what):
    line, said = BAD[what]
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ITEMS[0])
    path.write_text("\n".join([good, good, line, *[line] * 6]))
    with pytest.raises(UserError) as error:
        local.read_choice(path)
    assert said in str(error.value) and "2 more broken lines" in str(error.value)


def test_files_are_found_and_told_apart(file, tmp_path):
    assert named(["quiz", "passkey"], tmp_path) == {"choice": {"files": [str(file)]}, "passkey": {}}
    assert named(["gsm8k"], tmp_path) == {"gsm8k": {}}, "its files may still come from --set"
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?", "answer": "#### 1"}')
    assert named(["gsm8k"], tmp_path) == {"gsm8k": {"files": [str(tmp_path / "gsm8k.jsonl")]}}
    with pytest.raises(UserError, match=r"Unknown eval task 'quizz'\. Did you mean 'quiz'"):
        named(["quizz"], tmp_path)
    chosen = {"choice": {"files": ["quiz"], "limit": 2}, "passkey": {}}
    assert with_files(chosen, tmp_path) == {"choice": {"files": [str(file)], "limit": 2}, "passkey": {}}
    with pytest.raises(UserError, match=r"no file 'quizz'\. Did you mean 'quiz'"):
        with_files({"choice": {"files": ["quizz"]}}, tmp_path)
    with pytest.raises(UserError, match=r"choice\.files: no file 'quizz'"):
        local.find("choice", ["quizz"])
    with pytest.raises(UserError, match="0 leaves no items"):
        local.limited("choice", [1], 0)
    with pytest.raises(UserError, match="Did you mean 'standard'"):
        suite("standart")


def test_statistics_against_numpy():
    a, b = [1.0, 0, 1, 1, 0, 1], [1.0, 1, 1, 0, 0, 1]
    assert stderr(a) == pytest.approx(np.std(a, ddof=1) / np.sqrt(6)) and stderr([1.0]) is None
    gap, error = difference(a, b)
    assert gap == pytest.approx(0) and error == pytest.approx(np.std(np.subtract(a, b), ddof=1) / np.sqrt(6))
    assert recovery(0.6, 0.7, 0.5) == pytest.approx(0.5) and recovery(0.6, 0.5, 0.5) is None
    assert solvable([1.0] * 10, 0.5) and not solvable([1.0, 0] * 5, 0.5) and not solvable([1.0], 0.9)
    rows = paired_rows("accuracy", "s", {"teacher": [1.0, 0] * 4, "student": [1.0] * 8}, Answers(), chance=0.5)
    assert rows[1]["recovery"] == 2 and rows[1]["recovery_above_chance"] is None and not rows[1]["solvable"]


def test_rolling_covers_every_token_once():
    requests = rolling_requests(list(range(10, 33)), 0, 10)
    asked = [token for request in requests for start, stop in request.spans for token in request.ids[start:stop]]
    assert asked == list(range(10, 33)) and [len(request.ids) for request in requests] == [11, 11, 11]
    assert requests[0].ids[0] == 0 and requests[2].ids[0] == 22 and requests[2].spans == ((8, 11),)


def test_rolling_perplexity(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text := helpers.words(30))
    rows = rolling(two_models(), TOKENS, tokenizer=tokenizer, answers=Answers(), files=[str(path)], context=50)
    ids = tokenizer.encode(text)
    model, total = helpers.tiny_model(), 0.0
    for request in rolling_requests(ids, 256, 50):
        with torch.no_grad():
            scores = model(torch.tensor([request.ids])).logits[0].double().log_softmax(-1)
        total -= sum(scores[at - 1, request.ids[at]].item() for at in range(*request.spans[0]))
    assert rows[0]["value"] == pytest.approx(np.exp(total / len(text.split())), rel=1e-5)


@pytest.mark.parametrize("text", ["", " \n"])
def test_rolling_text_without_text(tmp_path, text):
    """Said without a model: nothing can be divided by no words."""
    (path := tmp_path / "none.txt").write_text(text)
    with pytest.raises(UserError, match=r"none\.txt holds no text"):
        rolling({}, TOKENS, tokenizer=None, answers=Answers(), files=[str(path)])


def test_small_parts():
    assert cut("a. b\n\nc", ["\n\n", "b"]) == "a. " and cut("abc", []) == "abc"
    assert (
        right(Problem("", "", "1200"), "so it is #### 1,200 dollars")
        and right(Problem("", "", "18"), "it is $18.")
        and not right(Problem("", "", "1"), "no")
    )
    assert repetition([1, 2, 3, 4, 5]) == 0 and repetition([7] * 8) == pytest.approx(0.8)
