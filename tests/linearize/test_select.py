"""From scores to heads within a budget."""

from itertools import pairwise

import pytest
from helpers import SIZES
from transformers import AutoConfig

import subquad
from subquad import UserError
from subquad.linearize.select import check, choose, share

ARGUMENTS = dict(mixer="window", window=8, sinks=2)
AT = 4096
SCORES = {0: [0.1, 0.9], 1: [0.5, 0.4], 2: [0.8, 0.2]}  # best first: (0,1) (2,0) (1,0) (1,1) (2,1) (0,0)


@pytest.fixture(scope="module")
def config():
    return AutoConfig.for_model("llama", **SIZES)


def kept(plan) -> set:
    """(layer, head) pairs that stay exact."""
    return {(layer.index, g) for layer in plan.layers for g in (range(layer.kv_heads) if layer.mixer is None else layer.exact)}


BUDGETS = {  # share of the bytes -> heads out of 6 that fit
    0.01: set(),
    0.18: {(0, 1)},
    0.36: {(0, 1), (2, 0)},
    0.52: {(0, 1), (2, 0), (1, 0)},
    0.70: {(0, 1), (2, 0), (1, 0), (1, 1)},
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_best_heads_first_within_the_budget(config, budget):
    plan = choose(config, scores=SCORES, kv_bytes=budget, at=AT, **ARGUMENTS)
    assert kept(plan) == BUDGETS[budget]
    assert share(plan, AT) <= budget < share(plan, AT) + 1 / 6


def test_whole_layers(config):
    plan = choose(config, scores=SCORES, granularity="layer", kv_bytes=0.4, at=AT, **ARGUMENTS)
    assert kept(plan) == {(0, 0), (0, 1)}, "ties go to the earlier layer; means are 0.5, 0.45, 0.5"
    plan = choose(config, scores={**SCORES, 2: [0.9, 0.9]}, granularity="layer", kv_bytes=0.7, at=AT, **ARGUMENTS)
    assert kept(plan) == {(0, 0), (0, 1), (2, 0), (2, 1)}


def test_without_scores_evenly_spread():
    config = AutoConfig.for_model("llama", **{**SIZES, "num_hidden_layers": 8, "num_key_value_heads": 1})
    plan = choose(config, scores=None, granularity="layer", kv_bytes=0.4, at=AT, **ARGUMENTS)
    layers = sorted(i for i, _ in kept(plan))
    assert len(layers) == 3 and all(b - a >= 2 for a, b in pairwise(layers)), layers
    assert kept(plan) < kept(choose(config, scores=None, granularity="layer", kv_bytes=0.6, at=AT, **ARGUMENTS))


def test_something_is_always_converted(config):
    plan = choose(config, scores=SCORES, kv_bytes=5.0, at=AT, **ARGUMENTS)
    assert plan.converted and len(kept(plan)) == 5


def test_layers_that_stay_anyway_are_paid_for(config):
    plan = choose(config, scores={1: [1.0, 0.0], 2: [0.5, 0.2]}, kv_bytes=0.52, at=AT, layers=[1, 2], **ARGUMENTS)
    assert kept(plan) == {(0, 0), (0, 1), (1, 0)}


def test_impossible_budget_says_what_is_possible(config):
    with pytest.raises(UserError, match=r"kv_bytes 0.001 at 64 tokens is .* Raise kv_bytes to at least 0\.1562") as refusal:
        choose(config, scores=SCORES, kv_bytes=0.001, at=64, **ARGUMENTS)
    assert len(refusal.value.problems) == 1
    check(subquad.plan(config, **ARGUMENTS), kv_bytes=0.1563, at=64)


@pytest.mark.parametrize("scores", [{0: [1.0, 1.0]}, {**SCORES, 1: [0.5]}])
def test_scores_of_another_model_are_refused(config, scores):
    with pytest.raises(UserError, match=r"do not fit this model: layers .*1"):
        choose(config, scores=scores, kv_bytes=0.5, at=AT, **ARGUMENTS)
