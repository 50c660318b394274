"""A plan says what would become what, from the config alone, and names every problem at once."""

import pytest
import torch
from helpers import SIZES, tiny_model
from linearize.students import PRESETS
from transformers import AutoConfig

import subquad
from subquad import UserError
from subquad.linearize.planner import with_exact

SLIDING = {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8}


@pytest.fixture(scope="module")
def config():
    return AutoConfig.for_model("llama", **SIZES)


def mixers(plan) -> list:
    return [layer.mixer for layer in plan.layers]


def test_every_layer_by_default(config):
    plan = subquad.plan(config)
    assert mixers(plan) == ["window"] * 3 and (plan.window, plan.sinks) == (64, 4)
    layer = plan.layers[1]
    assert (layer.index, layer.name, layer.hidden) == (1, "model.layers.1.self_attn", 64)
    assert (layer.kv_heads, layer.groups, layer.query_heads, layer.key, layer.value) == (2, 2, 4, 16, 16)


def test_config_and_model_give_one_plan(config):
    model = tiny_model()
    assert subquad.plan(model, exact=[0]).layers == subquad.plan(model.config, exact=[0]).layers
    student = subquad.linearize(model, subquad.plan(model, exact=[0]))
    assert subquad.plan(student, exact=[0]).layers == subquad.plan(config, exact=[0]).layers, "a student can be planned anew"


def test_planning_takes_no_memory_and_changes_nothing(config):
    """A model of 70 billion parameters is planned on any machine."""
    large = AutoConfig.for_model(
        "llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    )
    before = large.to_dict()
    plan = subquad.plan(large, mixer="gla")
    assert len(plan.converted) == 80 and large.to_dict() == before


EXACT = {
    "layers": ([0, 2], [None, "gla", None], [(), (), ()]),
    "heads": ({0: [1], 2: [0]}, ["gla"] * 3, [(1,), (), (0,)]),
    "all heads of a layer": ({0: [1, 0]}, [None, "gla", "gla"], [(), (), ()]),
    "no heads": ({0: []}, ["gla"] * 3, [(), (), ()]),
    "layers and heads": ([2, {1: [1]}], ["gla", "gla", None], [(), (1,), ()]),
    "a layer in two entries": ([{1: [0]}, {1: [1], 0: [1]}], ["gla", None, "gla"], [(1,), (), ()]),
    "a head named twice": ({1: [1, 1]}, ["gla"] * 3, [(), (1,), ()]),
    "a range": (range(2), [None, None, "gla"], [(), (), ()]),
}


@pytest.mark.parametrize("what", EXACT)
def test_exact(config, what):
    exact, wanted, heads = EXACT[what]
    plan = subquad.plan(config, mixer="gla", exact=exact)
    assert mixers(plan) == wanted and [layer.exact for layer in plan.layers] == heads
    assert all(layer.why == "kept exact" for layer in plan.layers if layer.mixer is None)


def test_layers_names_what_is_converted(config):
    plan = subquad.plan(config, layers=[1])
    assert mixers(plan) == [None, "window", None] and plan.layers[0].why == "not named"


def test_layers_with_a_window_of_their_own_stay_unless_named():
    config = AutoConfig.for_model("gemma2", **SIZES, **SLIDING)
    plan = subquad.plan(config)
    assert mixers(plan) == ["window", None, "window"] and "window of 8" in plan.layers[1].why
    named = subquad.plan(config, layers=[1])
    assert mixers(named) == [None, "window", None] and named.layers[1].window == 8, "never wider than the teacher's"
    only = subquad.plan(AutoConfig.for_model("mistral", **SIZES, sliding_window=8))
    assert mixers(only) == ["window"] * 3, "a model that has no other layers"


def test_recurrent_layers_are_not_in_the_plan():
    config = AutoConfig.for_model("lfm2", **SIZES, layer_types=["full_attention", "conv", "full_attention"])
    assert [layer.index for layer in subquad.plan(config).layers] == [0, 2]


PROBLEMS = {
    "mixer": (dict(mixer="glaa"), ["Unknown mixer 'glaa'. Did you mean 'gla'? Known: "]),
    "window": (dict(window=0), ["window: got 0, a window holds at least 1 token."]),
    "sinks": (dict(sinks=-1), ["sinks: got -1, allowed: 0 or more."]),
    "layer": (dict(layers=[1, 3]), ["layers: 3 is not an attention layer; layers with attention: 0..2."]),
    "exact layer": (dict(exact=[7]), ["exact: 7 is not an attention layer; layers with attention: 0..2."]),
    "exact in a list": (dict(exact=[7, {1: [2]}]), ["exact: 7 is not", "exact: layer 1 has key/value heads 0..1, got 2."]),
    "exact head": (dict(exact={1: [0, 2]}), ["exact: layer 1 has key/value heads 0..1, got 2."]),
    "window of a fraction": (
        dict(window=8.0, sinks="4"),
        ["window: got 8.0, expected a whole number.", "sinks: got '4', expected a whole"],
    ),
    "one layer, no list": (
        dict(exact=0, layers=1),
        ["exact: got 0, expected layers (whole numbers)", "layers: got 1, expected a list of layers"],
    ),
    "a layer in quotes": (dict(exact="0"), ["exact: got '0', expected layers (whole numbers)"]),
    "layers in quotes": (dict(exact=["0"], layers=["1"]), ["exact: got ['0'], expected layers", "layers: got ['1'], expected a list"]),
    "exact after JSON": (dict(exact={"0": [1]}), ["exact: got {'0': [1]}, expected layers (whole numbers)"]),
    "one head, no list": (dict(exact=[2, {0: 1}]), ["exact: got [2, {0: 1}], expected layers (whole numbers)"]),
    "option": (dict(mixer="gla", options={"featuremap": "x"}), ["options.featuremap: no such option. Did you mean 'feature_map'?"]),
    "option value": (dict(mixer="gla", options={"decay": "vectr"}), ["options.decay: got 'vectr', allowed: none, scalar, vector, "]),
    "option type": (dict(mixer="gla", options={"rank": True}), ["options.rank: expected a int, got True."]),
    "options of window": (dict(options={"decay": "none"}), ["options.decay: mixer 'window' takes no options."]),
    "weights of keys": (
        dict(mixer="rala", options={"feature_map": "hedgehog_softmax"}),
        ["needs a feature map with one feature per key channel."],
    ),
    "signed features": (dict(mixer="gla", options={"feature_map": "unit"}), ["divides by a sum of features and needs a positive map"]),
    "delta without unit keys": (
        dict(mixer="gla", options={"write": "delta"}),
        ["use feature_map unit", "write delta goes with decay none or scalar"],
    ),
    "exponents without a divisor": (
        dict(mixer="gla", options={"feature_map": "log_normal", "decay": "none", "normaliser": "none"}),
        ["log_normal is kept in range by the sum it is divided by: normaliser none does not divide."],
    ),
    "a cache with slots": (dict(mixer="gsa", options={"cache": 8}), ["cache 8 does not go with slots"]),
    "a cache without a window": (dict(mixer="linear", options={"cache": 8, "combine": "alone"}), ["options.cache keeps pairs"]),
    "a cache behind the branch": (
        dict(mixer="rodimus_plus", options={"cache": 8}),
        ["it goes with a window that tokens leave for the state"],
    ),
    "a cache and momentum": (dict(mixer="titans", options={"cache": 8}), ["options.cache keeps pairs"]),
    "a cache of less than nothing": (dict(mixer="gla", options={"cache": -1}), ["options.cache: got -1, allowed: 0 or more"]),
    "slots of momentum": (
        dict(mixer="abc", options={"container": "slots", "write": "momentum", "decay": "own_scalar"}),
        ["container slots goes with write additive or delta or step or dual, got momentum"],
    ),
    "slots and decays of the key": (
        dict(mixer="abc", options={"container": "slots", "decay": "pooled_key"}),
        ["decay pooled_key has one number per key channel, and container slots asks for one per slot or per head."],
    ),
    "slots, features and vectors": (
        dict(mixer="gated_delta", options={"container": "slots", "decay": "vector"}),
        [
            "feature_map unit does not go with slots, which have a softmax",
            "write delta goes with decay none or scalar or own_scalar, got vector.",
        ],
    ),
    "slots with gates and features": (
        dict(mixer="gsa", options={"feature_map": "elu1"}),
        ["does not go with slots, which have gates and a softmax"],
    ),
    "levels of momentum": (
        dict(mixer="titans", options={"container": "levels"}),
        ["container levels goes with write additive or delta or step or convex or dual, got momentum"],
    ),
    "levels and counts": (dict(mixer="mala", options={"container": "levels"}), ["normaliser magnitude asks for sums over all tokens"]),
    "partitions of the delta rule": (
        dict(mixer="gated_delta", options={"container": "partitions"}),
        ["write delta corrects what it wrote by key: container partitions"],
    ),
    "blocks of other weights": (dict(mixer="moba", options={"weights": "sigmoid"}), ["it goes with weights softmax and near false, not sigmoid, False"]),
    "blocks in a window": (dict(mixer="swat", options={"weights": "softmax", "blocks": True}), ["not softmax, True"]),
    "phases with decays by channel": (dict(mixer="mamba", options={"position": "phase"}), ["write selective goes with normaliser none"]),
    "options that nothing reads": (
        dict(mixer="gla", options={"features": 7, "slots": 99, "horizon": 9, "rank": 8, "partitions": 4}),
        [
            "options.features: mixer 'gla' does not read it with feature_map=hedgehog_softmax. It counts with feature_map=favor or gmm or",
            "options.slots: mixer 'gla' does not read it with container=plain. It counts with container=gated_slots or softmax_slots or slots.",
            "options.horizon: mixer 'gla' does not read it with feature_map=hedgehog_softmax. It counts with feature_map=cosine.",
        ],
    ),
    "a rank that nothing reads": (
        dict(mixer="deltanet", options={"rank": 8}),
        ["does not read it with decay=none, write=delta, position=keep, output=norm. It counts with decay=vector or own_vector or dual;"],
    ),
    "an output under a joint normaliser": (dict(mixer="window_linear", options={"output": "norm"}), ["not read it with combine=joint"]),
    "blocks that are not chosen": (dict(mixer="fox", options={"top": 9}), ["not read it with blocks=False. It counts with blocks=True."]),
    "no features": (
        dict(mixer="kernelized", options={"features": 1}),
        ["makes 0 features of a key of 16 numbers: raise options.features."],
    ),
    "nothing left": (dict(exact=[0, 1, 2]), ["Nothing to convert in 'llama': kept exact."]),
    "several": (
        dict(window=0, sinks=-2, layers=[9], exact={0: [5], 8: [0]}),
        ["window: got 0", "sinks: got -2", "layers: 9", "exact: layer 0 has", "exact: 8 is not"],
    ),
    "several options": (dict(mixer="gla", options={"decay": 1, "rnk": 2}), ["options.decay: got 1", "options.rnk: no such option"]),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_problems_are_named_all_at_once(config, what):
    arguments, problems = PROBLEMS[what]
    with pytest.raises(UserError) as refusal:
        subquad.plan(config, **arguments)
    assert len(refusal.value.problems) == len(problems), refusal.value.problems
    for problem in problems:
        assert problem in str(refusal.value)


MODELS = {
    "not causal": ("bert", {}, "bidirectional and mixer .window. is not"),
    "chunked attention, named": (
        "llama4_text",
        {"head_dim": 16, "num_local_experts": 4, "attention_chunk_size": 8, "layer_types": ["chunked_attention"] * 3},
        "runs chunked_attention here",
    ),
    "pairs of an odd size": ("gpt2", {"hidden_size": 60}, "turns pairs of features, and feature_map identity makes 15 features"),
    "no language model": ("vit", {}, "no causal language model for model type 'vit'"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_cannot_be_planned(what):
    model_type, changes, words = MODELS[what]
    more = {"layers": [0]} if "named" in what else {"mixer": "selective_rope"} if "pairs" in what else {}
    with pytest.raises(UserError, match=words):
        subquad.plan(AutoConfig.for_model(model_type, **{**SIZES, **changes}), **more)


@pytest.mark.parametrize("mixer", PRESETS)
def test_with_exact(config, mixer):
    base = subquad.plan(config, mixer=mixer)
    for exact in ({}, {0: [1], 2: [0, 1]}, {1: [0]}):
        assert with_exact(base, exact) == subquad.plan(config, mixer=mixer, exact=exact)
    assert with_exact(with_exact(base, {0: [1]}), {}) == base
    assert with_exact(subquad.plan(config, mixer=mixer, layers=[1]), {0: [0], 1: [0]}).layers[0].mixer is None


def test_dtype_of_the_config_sets_the_bytes():
    config = AutoConfig.for_model("llama", **SIZES, dtype=torch.bfloat16)
    assert subquad.plan(config).teacher_bytes(100) * 2 == subquad.plan(AutoConfig.for_model("llama", **SIZES)).teacher_bytes(100)
