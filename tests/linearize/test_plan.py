"""The plan as a value: JSON both ways, bytes as they are measured, parameters as they are counted."""

import json

import pytest
import torch
from helpers import tiny_model
from linearize.students import PRESETS, chunked, student_of, tokens
from tolerances import BYTES

import subquad
from subquad import Plan, UserError
from subquad.linearize.params import mixer_parameters
from subquad.linearize.state import cache_bytes

SHAPES = {"all": None, "some": [1], "heads": {0: [0], 1: [1]}}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 24}
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
}


@pytest.mark.parametrize("mixer", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_json_both_ways(tiny_llama, mixer, shape):
    options = {"window": {}, "nha": {"slots": 16}}.get(mixer, {"mass": -3.0})
    plan = subquad.plan(tiny_llama, mixer=mixer, exact=SHAPES[shape], window=7, sinks=1, options=options)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


DAMAGE = {
    "missing": (lambda d: d.pop("mixer"), "does not fit this version"),
    "unknown key": (lambda d: d.update(speed=9), "does not fit this version"),
    "unknown key of a layer": (lambda d: d["layers"][0].update(speed=9), "does not fit this version"),
    "layer without heads": (lambda d: d["layers"][0].pop("exact"), "does not fit this version"),
    "mixer of another version": (lambda d: d["layers"][0].update(mixer="glaa"), "Did you mean 'gla'"),
    "module path for a mixer": (lambda d: d["layers"][0].update(mixer="os:system"), "Unknown mixer"),
    "no number": (lambda d: d["layers"][0].update(window="8"), r"plan.layers.0.window: got '8', expected int"),
    "no whole number": (lambda d: d.update(window=8.0), r"plan.window: got 8.0, expected int"),
    "yes for a number": (lambda d: d["layers"][1].update(sinks=True), r"plan.layers.1.sinks: got True, expected int"),
    "no name": (lambda d: d["layers"][0].update(name=None), r"plan.layers.0.name: got None, expected str"),
    "no options": (lambda d: d.update(options=["a"]), r"plan.options: got \['a'\], expected dict"),
    "no size": (
        lambda d: d["layers"][0].update(key="16", kv_heads=None, mixer=["gla"]),
        r"layers.0.mixer: got \['gla'\], expected str . None",
    ),
    "less than nothing": (lambda d: d["layers"][2].update(window=-1), r"plan.layers.2.window: got -1, allowed: 1 or more"),
    "no window": (lambda d: d.update(window=0), r"plan.window: got 0, allowed: 1 or more"),
    "no such head": (lambda d: d["layers"][0].update(exact=[9]), r"plan.layers.0.exact: got \[9\], allowed: key/value heads of 0..1"),
    "every head": (lambda d: d["layers"][0].update(exact=[0, 1]), "each once and not all of them"),
    "several": (
        lambda d: (d["layers"][0].update(groups=0), d["layers"][1].update(exact=["0"]), d.update(sinks=-1, options={"bias": 1})),
        r"(?s)plan.sinks: got -1.*plan.layers.0.groups: got 0.*plan.layers.1.exact: got \['0'\].*options.bias.*make it again",
    ),
    "option of another version": (lambda d: d.update(options={"bias": 1}), "options.bias"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_json_that_does_not_fit(tiny_llama, what):
    damage, words = DAMAGE[what]
    data = json.loads(json.dumps(subquad.plan(tiny_llama, mixer="gla").to_dict()))
    damage(data)
    with pytest.raises(UserError, match=words):
        Plan.from_dict(data)


CASES = [("llama", mixer, shape) for mixer in PRESETS for shape in SHAPES] + [(f, "gla", "heads") for f in FAMILIES if f != "llama"]


@pytest.mark.parametrize(("family", "mixer", "shape"), CASES, ids=["-".join(c) for c in CASES])
def test_planned_bytes_are_measured_bytes(family, mixer, shape):
    teacher = tiny_model(family, **FAMILIES[family])
    plan = subquad.plan(teacher, mixer=mixer, window=16, sinks=4, exact=SHAPES[shape])
    student = student_of(teacher, plan)
    for context in (60, 200):
        ids = tokens(1, context)
        for what, model, planned in (("student", student, plan.student_bytes(context)), ("teacher", teacher, plan.teacher_bytes(context))):
            measured = cache_bytes(chunked(model, ids, [context // 2, context])[1])
            assert abs(planned / measured - 1) <= BYTES, f"{what} at {context}: planned {planned:,}, measured {measured:,}"


def test_bytes_in_bf16(tiny_llama):
    teacher = tiny_llama.bfloat16()
    teacher.config.dtype = torch.bfloat16
    plan = subquad.plan(teacher, mixer="gated_delta", window=16, sinks=4, exact=SHAPES["heads"])
    measured = cache_bytes(chunked(student_of(teacher, plan), tokens(1, 100), [100])[1])
    assert abs(plan.student_bytes(100) / measured - 1) <= BYTES


@pytest.mark.parametrize("mixer", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_added_are_the_models(tiny_llama, mixer, shape):
    before = tiny_llama.num_parameters()
    plan = subquad.plan(tiny_llama, mixer=mixer, exact=SHAPES[shape])
    student = student_of(tiny_llama, plan)
    assert plan.parameters_added() == sum(p.numel() for p in mixer_parameters(student).values()) == student.num_parameters() - before


def test_constant_memory_is_constant(tiny_llama):
    for mixer in PRESETS:
        plan = subquad.plan(tiny_llama, mixer=mixer)
        assert plan.student_bytes(1000) == plan.student_bytes(131072) < plan.teacher_bytes(1000)
