import pytest
from pydantic import ValidationError

from subquad.distill.losses import LOSSES
from subquad.distill.stage import Lora, Stage, parse_count
from subquad.registry import lookup

LOCAL = {"name": "transfer", "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1}, "tokens": "20k", "lr": "1e-2"}
DEEP = {"name": "recover", "train": "lora", "inputs": "own", "losses": {"kl": 1.0}, "tokens": "1M", "lr": 1e-4}


@pytest.mark.parametrize("name", LOSSES)
def test_every_row_of_the_table_resolves(name):
    assert callable(lookup("loss", name, LOSSES))


@pytest.mark.parametrize(
    ("given", "count"), [(7, 7), ("20000", 20000), ("20k", 20000), ("20 k", 20000), ("1M", 10**6), ("1.5M", 1_500_000), ("2_000", 2000)]
)
def test_counts(given, count):
    assert parse_count(given) == count


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (LOCAL, {"steps": 39, "lr": 0.01, "tokens": 20000, "context": 512, "batch": 1, "lora": Lora()}),
        (DEEP, {"steps": 1953, "betas": (0.9, 0.95), "schedule": "cosine", "final_lr": 0.1, "temperature": 1.0}),
        (DEEP | {"lora": {"rank": 4, "targets": "all"}}, {"lora": Lora(rank=4, targets="all")}),
        (DEEP | {"losses": {"kl": "1", "cross_entropy": 0.1}, "temperature": 2}, {"losses": {"kl": 1.0, "cross_entropy": 0.1}}),
        (DEEP | {"betas": [0.8, 0.9], "context": "1k", "repeat": 0.5}, {"betas": (0.8, 0.9), "context": 1000, "steps": 1000}),
    ],
)
def test_good_stages(stage, expected):
    made = Stage(**stage)
    assert {name: getattr(made, name) for name in expected} == expected
    assert Stage.model_validate_json(made.model_dump_json()) == made  # also with every default written out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lrr": 1}, ["lrr"]),
        ({"tokens": True}, ["whole number"]),
        ({"tokens": "many"}, ["20k or 1M", "many"]),
        ({"tokens": "1.5"}, ["whole number"]),
        ({"tokens": 0}, ["greater than or equal to 1"]),
        ({"lr": True}, ["expected a number"]),
        ({"lr": 0}, ["greater than 0"]),
        ({"lr": float("nan")}, ["finite"]),
        ({"warmup": 1.0}, ["less than 1"]),
        ({"repeat": 2}, ["less than or equal to 1"]),
        ({"name": "a/b"}, ["pattern"]),
        ({"losses": {}}, ["at least 1"]),
        ({"losses": {"kll": 1}}, ["'kll'", "Did you mean 'kl'?"]),
        ({"losses": {"kl": -1}}, ["greater than 0"]),
        ({"losses": {"attention_output": 1}}, ["inputs: teacher"]),
        ({"inputs": "teacher"}, ["kl cannot be used", "train: lora"]),
        ({"tokens": 100}, ["less than one step"]),
        ({"context": 33, "repeat": 0.5}, ["even"]),
        ({"losses": {"cross_entropy": 1}, "temperature": 2}, ["temperature is used by the loss kl"]),
        ({"train": "all", "lora": {"rank": 4}}, ["adds no adapters"]),
        ({"schedule": "constant", "final_lr": 0.2}, ["no meaning"]),
        ({"train": "mixer"}, ["mixers"]),
        ({"lora": {"rank": 0}}, ["greater than or equal to 1"]),
        (
            {"context": 1, "tokens": 1, "temperature": 2, "losses": {"attention_output": 1}},
            ["no next token", "temperature", "own inputs"],
        ),
    ],
)
def test_bad_stages(changes, said):
    with pytest.raises(ValidationError) as caught:
        Stage(**DEEP | changes)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, 0.5, 0.1),
        ({"schedule": "linear", "final_lr": 0.0}, 0.5, 0.0),
        ({"schedule": "constant"}, 0.5, 1.0),
        ({"warmup": 0, "schedule": "constant"}, 1.0, 1.0),
    ],
)
def test_learning_rate(changes, first, last):
    stage = Stage(**DEEP | {"tokens": 40, "context": 2, "lr": 1.0, "warmup": 0.1} | changes)
    rates = [stage.lr_at(step) for step in range(stage.steps)]
    assert rates[0] == pytest.approx(first) and rates[-1] == pytest.approx(last)
    assert max(rates) == pytest.approx(1.0) and rates[2:] == sorted(rates[2:], reverse=True)


def test_one_step_stage_has_a_learning_rate():
    assert Stage(**DEEP | {"tokens": 512}).lr_at(0) > 0
