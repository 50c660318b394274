"""Recall texts: the answer can be found by reading, stands where it should, and fits the length; scores are what greedy decoding would give."""

import re
from random import Random

import helpers
import pytest
import torch

from subquad.errors import UserError
from subquad.evals import TASKS, task_settings
from subquad.evals.answers import Answers
from subquad.evals.models import loaded
from subquad.evals.recall import items, tasks
from subquad.evals.recall.items import value_of, written
from subquad.evals.synthetic import NO_LABEL, TOKEN_TASKS, token_task
from subquad.registry import lookup

TOKENS = torch.arange(10)


def read_passkey(text):
    return [re.search(r"pass key is (\d+)\. Remember", text).group(1)]


def read_niah(text):
    name = re.search(r"secret numbers? of (\w+),? (?:is|in the order of the text, are)$", text).group(1)
    return re.findall(rf"The secret number of {name} is (\d+)\.", text)


def read_phonebook(text):
    name = text.rsplit("\n", 1)[1][:-1]
    return [re.search(rf"^{re.escape(name)}: (\d+)$", text, re.MULTILINE).group(1)]


def read_mqar(text):
    return [
        re.search(rf"^{key} = (\w+)$", text, re.MULTILINE).group(1)
        for key in re.findall(r"^(\w+) =", text.partition("again:\n")[2], re.MULTILINE)
    ]


def read_copying(text):
    return text.partition("\n\n")[0].split()[1:]


def read_selective(text):
    return re.findall(r"^yes: (\w+)$", text.partition("\nAll lines")[0], re.MULTILINE)


def read_induction(text):
    words = text.split()
    return [words[words.index(words[-1]) + 1]]


def read_listops(text):
    """By another method than the maker's: innermost brackets first."""
    part = text.rsplit("\n", 1)[1].removesuffix(" =")
    while (found := re.search(r"\[(\w+)((?: \d)+) \]", part)) is not None:
        numbers = sorted(map(int, found.group(2).split()))
        result = {"MIN": numbers[0], "MAX": numbers[-1], "MED": numbers[(len(numbers) - 1) // 2], "SM": sum(numbers) % 10}[found.group(1)]
        part = part[: found.start()] + str(result) + part[found.end() :]
    return [part]


def read_variables(text):
    value, held = re.search(r"value (\d+) are$", text).group(1), []
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        if source == value or source in held:
            held.append(name)
    return held


READERS = {
    "passkey": (items.passkey, read_passkey),
    "niah_single": (items.niah_single, read_niah),
    "niah_multi_key": (items.niah_multi_key, read_niah),
    "niah_multi_value": (items.niah_multi_value, read_niah),
    "phonebook": (items.phonebook, read_phonebook),
    "mqar": (items.mqar, read_mqar),
    "copying": (items.copying, read_copying),
    "selective_copying": (items.selective_copying, read_selective),
    "induction": (items.induction, read_induction),
    "listops": (items.listops, read_listops),
    "variable_tracking": (items.variable_tracking, read_variables),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_solves_it(name):
    """The solvability check: somebody who reads the whole text answers everything, at every depth and size."""
    maker, read = READERS[name]
    for seed, units, depth in ((0, 8, 0.0), (1, 20, 0.5), (2, 60, 1.0), (3, 33, 0.25)):
        item = maker(Random(seed), units, depth)
        wanted = [item.text[start:stop].strip() for start, stop in item.answers]
        prompt = item.parts[0][0] if name not in ("mqar",) else item.text
        assert read(prompt) == wanted, (name, seed)
        assert 0 < item.chance <= 0.5 and maker(Random(seed), units, depth) == item


@pytest.mark.parametrize("name", ["passkey", "phonebook", "induction", "niah_single"])
def test_depth_is_where_it_says(name):
    maker, read = READERS[name]
    for depth in (0.0, 0.5, 1.0):
        prompt = (item := maker(Random(5), 200, depth)).parts[0][0]
        assert abs(prompt.index(read(prompt)[0]) / len(prompt) - depth) < 0.15, (depth, item.parts[1])


def test_listops_notation():
    tree = ("MAX", [2, 9, ("MIN", [4, 7]), 0])
    assert written(tree) == "[MAX 2 9 [MIN 4 7 ] 0 ]" and value_of(tree) == 9
    assert value_of(("SM", [9, 9, 4])) == 2 and value_of(("MED", [1, 2, 8, 9])) == 2


@pytest.mark.parametrize("name", [name for name, row in TASKS.items() if ".recall." in row])
def test_every_task_fills_its_length(name, tiny_tokenizer):
    """A byte a token: texts of at most the length, and nearly it; the scores are those of greedy decoding with the right answers fed."""
    models = loaded(teacher=helpers.tiny_model())
    task = lookup("eval task", name, TASKS)
    asked = []
    kept, tasks.score_all = tasks.score_all, lambda models, requests, answers: asked.extend(requests) or kept(models, requests, answers)
    try:
        rows = task(models, TOKENS, tokenizer=tiny_tokenizer, answers=Answers(), lengths=[700], samples=1)
    finally:
        tasks.score_all = kept
    assert rows and all(0 <= row["value"] <= 1 and row["length"] == 700 for row in rows)
    assert all(600 < len(request.ids) <= 700 for request in asked), [len(request.ids) for request in asked]
    request = asked[0]
    with torch.no_grad():
        best = helpers.tiny_model()(torch.tensor([request.ids])).logits[0].argmax(-1)
    right = [all(best[at - 1] == request.ids[at] for at in range(start, stop)) for start, stop in request.spans]
    first = next(row for row in rows if row["metric"] != "accuracy" or row["n"] == 1)
    assert first["value"] == pytest.approx(sum(right) / len(right))
    assert tiny_tokenizer.decode(request.ids[request.spans[0][0] : request.spans[0][1]]).startswith(" ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": [20]}, "20 are too few. Give at least"),
        ({"depths": [2.0]}, "from 0 .start. to 1"),
        ({"samples": 0}, "passkey.samples"),
    ],
)
def test_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tasks.passkey(loaded(m=helpers.tiny_model()), TOKENS, tokenizer=helpers.tiny_tokenizer(), answers=Answers(), **settings)


@pytest.mark.parametrize("name", [name for name, row in TASKS.items() if ".recall." in row])
def test_lengths_are_checked_without_models(name):
    task, handed = lookup("eval task", name, TASKS), {"tokenizer": helpers.tiny_tokenizer(), "answers": Answers()}
    with pytest.raises(UserError) as error:
        task({}, TOKENS, **handed, lengths=[16, 17, 512])
    assert [re.search(r"(\d+) are too few", problem).group(1) for problem in error.value.problems] == ["16", "17"]
    assert task({}, TOKENS, **handed, lengths=[512]) == []


def test_settings_are_the_shared_ones_and_the_makers_own():
    shared = {"lengths", "samples", "seed"}
    assert set(task_settings("mqar")) == {*shared, "depths", "queries"}
    assert set(task_settings("copying")) == shared and set(task_settings("listops")) == {*shared, "shots"}
    with pytest.raises(UserError, match=r"mqar\.queries: expected a whole number of at least 1, got 0"):
        tasks.mqar({}, TOKENS, tokenizer=None, answers=Answers(), queries=0)


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_token_tasks_can_be_solved_by_reading(name):
    """Every label stands `distance` tokens before the question, and for recall tasks after an earlier copy of the question."""
    batch = token_task(name, {})(torch.Generator().manual_seed(0), 4)
    asked = batch.labels != NO_LABEL
    rows, places = asked.nonzero(as_tuple=True)
    assert torch.equal(batch.ids[rows, places - batch.distance[asked]], batch.labels[asked])
    if name in ("mqar", "induction"):
        assert torch.equal(batch.ids[rows, places - batch.distance[asked] - 1], batch.ids[rows, places])
    again = token_task(name, {})(torch.Generator().manual_seed(0), 4)
    assert torch.equal(batch.ids, again.ids) and 0 < batch.chance < 0.1


def test_token_task_settings_are_checked():
    with pytest.raises(UserError, match="Did you mean 'pairs'"):
        token_task("mqar", {"pair": 3})
    with pytest.raises(UserError, match=r"more than 4, half of mqar\.letters"):
        token_task("mqar", {"pairs": 5, "letters": 8})
