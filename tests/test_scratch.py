"""Models trained from scratch on recall: the ladder, what rows say, and that softmax finds what a window cannot."""

import pytest
import torch

from subquad import scratch
from subquad.errors import UserError
from subquad.evals.synthetic import NO_LABEL
from subquad.progress import Reporter
from subquad.scratch import Budget, rungs, train_mixer, train_mixers

EASY = {"pairs": 2, "queries": 2, "gap": 8, "letters": 16}
SMALL = Budget(steps=1000, batch=64, window=2, sinks=1, test_batches=4)


def test_softmax_solves_what_a_window_cannot():
    """benchmarks/mqar_from_scratch.py is the full size."""
    softmax = train_mixer("softmax", settings=EASY, budget=SMALL)
    window = train_mixer("window", settings=EASY, budget=Budget(**{**SMALL.__dict__, "steps": 60}))
    assert softmax[-1]["value"] >= 0.99 and "beyond 2 windows of 2" in softmax[-1]["setting"]
    assert window[-1]["value"] <= window[-1]["chance"] + 4 * window[-1]["stderr"]
    assert window[-1]["state_bytes"] < softmax[-1]["state_bytes"]


def test_same_seed_same_numbers():
    budget = Budget(steps=4, batch=4, test_batches=1)
    assert train_mixer("gated_delta", settings=EASY, budget=budget) == train_mixer("gated_delta", settings=EASY, budget=budget)


def test_ladder_ends_at_the_task_asked_for():
    ladder = rungs("mqar", {"pairs": 16, "queries": 8, "gap": 4})
    assert sum(share for _, share in ladder) == pytest.approx(1)
    lengths = [draw(torch.Generator().manual_seed(0), 1).ids.shape[1] for draw, _ in ladder]
    assert lengths == [1 + 2 * 2 + 2, 1 + 2 * 4 + 2, 1 + 2 * 8 + 4 + 4, 1 + 2 * 16 + 4 + 8]
    assert all((draw(torch.Generator().manual_seed(0), 1).labels != NO_LABEL).any() for draw, _ in rungs("induction", {}))


def test_mistakes_are_named_at_once():
    with pytest.raises(UserError) as error:
        train_mixers(["gated_delt"], "mqar", ["train.step=3", "tsk.pairs=1"], Reporter())
    assert all(word in str(error.value) for word in ("Did you mean 'gated_delta'", "Did you mean 'steps'", "tsk: no such key"))
    with pytest.raises(UserError, match="Unknown token task"):
        train_mixer("window", "mqra")
    for sizes in ({"hidden": 65}, {"hidden": 7, "heads": 1}):
        with pytest.raises(UserError, match="cannot be split"):
            scratch.build("window", None, Budget(**sizes), 10)


BAD = {  # --set -> what the message must hold
    "train.steps=1.5": "train.steps: Input should be a valid integer",
    "train.window=1.5": "train.window: Input should be a valid integer",
    "train.steps=-1": "train.steps: Input should be greater than or equal to 1. Got -1",
    "train.heads=0": "train.heads: Input should be greater than or equal to 1",
    "train.layers=0": "train.layers: Input should be greater than or equal to 1",
    "train.test_batches=0": "train.test_batches: Input should be greater than or equal to 1",
    "train.sinks=-1": "train.sinks: Input should be greater than or equal to 0",
    "train.lr=0": "train.lr: Input should be greater than 0",
    "train.enough=2": "train.enough: Input should be less than or equal to 1",
    "train.steps=true": "train.steps: expected a whole number",
    "train=3": "train: Input should be a valid dictionary",
    "task=3": "task: Input should be a valid dictionary",
    "options=3": "options: Input should be a valid dictionary",
    "options.decy=none": "Did you mean 'decay'",
}


@pytest.mark.parametrize("text", BAD)
def test_settings_are_checked_before_the_first_model_trains(text, monkeypatch):
    monkeypatch.setattr(scratch, "train_mixer", lambda *args, **more: pytest.fail("a model was trained"))
    with pytest.raises(UserError) as error:
        train_mixers(["softmax", "gla", "window"], "mqar", [text], Reporter())
    assert BAD[text] in str(error.value)


def test_settings_reach_the_training(monkeypatch):
    asked = {}
    monkeypatch.setattr(scratch, "train_mixer", lambda name, task, **more: asked.update({name: more}) or [])
    train_mixers(["softmax", "gla"], "mqar", ["train.steps=2k", "train.sinks=0", "task.pairs=4", "options.decay=none"], Reporter())
    assert asked["gla"]["budget"] == Budget(steps=2000, sinks=0) and asked["gla"]["settings"] == {"pairs": 4}
    assert asked["gla"]["options"] == {"decay": "none"} and not asked["softmax"]["options"]
