"""Decode: what is in the caches, how the models take turns, what the rows say."""

from contextlib import contextmanager
from functools import partial

import helpers
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from subquad.errors import UserError
from subquad.evals import fill, speed
from subquad.evals.models import loaded
from subquad.evals.rows import arrange
from subquad.evals.speed import WARM_UP, decode

TOKENS = torch.arange(250)


def cache_bytes(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def expected_bytes(tokens):
    return 3 * 2 * tokens * 2 * 16 * 4  # layers x kv heads x tokens x (keys, values) x head size x fp32


@pytest.mark.parametrize("how", ["auto", "prefill"])
def test_rows(how):
    models = loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(seed=1))
    rows = decode(models, TOKENS, cache_bytes=cache_bytes, contexts=[33, 700], new_tokens=3, fill=how)
    assert [(row["model"], row["metric"]) for row in rows[:4]] == [
        ("teacher", "decode_tokens_per_second"),
        ("student", "decode_tokens_per_second"),
        ("teacher", "state_bytes"),
        ("student", "state_bytes"),
    ]
    assert rows[0]["setting"] == f"33 tokens, 3 steps, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    assert all(row["value"] > 0 for row in rows)
    assert [row["value"] for row in rows if row["metric"] == "state_bytes"] == [expected_bytes(33)] * 2 + [expected_bytes(700)] * 2
    assert {row["setting"] for row in rows if row["metric"] == "state_bytes"} == {"33 tokens", "700 tokens"}


def test_models_take_turns():
    model, entered = helpers.tiny_model(), []

    @contextmanager
    def note(name):
        entered.append(name)
        yield model

    decode({"a": lambda: note("a"), "b": lambda: note("b")}, TOKENS, cache_bytes=cache_bytes, contexts=5, new_tokens=4)
    assert entered == ["a", "b"] * (1 + WARM_UP + 4)  # once to fill, then every step


def test_rate_is_of_the_median_step_without_warm_up(monkeypatch):
    times = iter([9.0] * WARM_UP + [0.5, 0.1, 7.0])
    monkeypatch.setattr(speed, "_seconds", lambda *_: next(times))
    rows = decode(loaded(teacher=helpers.tiny_model()), TOKENS, cache_bytes=cache_bytes, contexts=5, new_tokens=3)
    assert rows[0]["value"] == 2.0


def test_prefill_is_the_model(tiny_llama, monkeypatch):
    """Chunks, then a step, give what one full pass gives."""
    monkeypatch.setattr(fill, "CHUNK", 16)
    ids, cache = torch.randint(257, (1, 50)), DynamicCache(config=tiny_llama.config)
    with torch.inference_mode():
        fill.prefill(tiny_llama, cache, ids[:, :-1])
        step = tiny_llama(ids[:, -1:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(step, tiny_llama(ids).logits[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "config"), [("llama", {}), ("mistral", {"sliding_window": 24})])
def test_extended_layers_have_the_shapes_of_a_prefill(family, config):
    model, ids = helpers.tiny_model(family, **config), torch.randint(257, (1, fill.PROMPT + 77))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.inference_mode():
        fill.prefill(model, caches[0], ids)
        fill.auto(model, caches[1], ids)
        steps = [model(ids[:, :1], past_key_values=cache).logits for cache in caches]
    shapes = [[(layer.keys.shape, layer.values.shape, layer.get_seq_length()) for layer in cache.layers] for cache in caches]
    assert shapes[0] == shapes[1]
    assert steps[1].isfinite().all()


def test_unknown_layers_are_prefilled_and_known_ones_can_be_added(tiny_llama, monkeypatch):
    class Own(DynamicLayer):
        pass

    class OwnCache(DynamicCache):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.layers = [Own() for _ in self.layers]

    monkeypatch.setattr(speed, "DynamicCache", OwnCache)
    lengths, extended, prefill = [], [], fill.prefill
    monkeypatch.setattr(fill, "prefill", lambda model, cache, ids: (lengths.append(ids.shape[1]), prefill(model, cache, ids)))
    context = fill.PROMPT + 30
    measure = partial(decode, loaded(teacher=tiny_llama), TOKENS, cache_bytes=cache_bytes, contexts=context, new_tokens=1)
    measure()
    assert lengths == [fill.PROMPT, 30]

    def extend(layer, tokens):
        extended.append(tokens)
        fill.repeat_tokens(layer, tokens)

    lengths.clear()
    rows = measure(fill=partial(fill.auto, extend={**fill.STOCK, Own: extend}))
    assert (lengths, extended) == ([fill.PROMPT], [30, 30, 30])
    assert rows[1]["value"] == expected_bytes(context)


def test_ratios():
    models = loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(num_key_value_heads=1))
    rows = arrange(decode(models, TOKENS, cache_bytes=cache_bytes, contexts=20, new_tokens=1), ["teacher", "student"])
    assert [row["ratio"] for row in rows if row["metric"] == "state_bytes"] == [1, 0.5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"contexts": []}, "decode.contexts: expected at least one"),
        ({"contexts": [64, 0]}, "decode.contexts: expected a whole number of at least 1, got 0"),
        ({"contexts": "32k"}, "got '32k'"),
        ({"new_tokens": 0}, "decode.new_tokens"),
        ({"fill": "prefil"}, "Did you mean 'prefill'?"),
        ({"fill": 3}, "decode.fill: expected one of auto, prefill"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(UserError) as error:
        decode({}, TOKENS, cache_bytes=cache_bytes, **settings)
    assert said in str(error.value)


def test_no_text():
    with pytest.raises(UserError, match="at least 1 token"):
        decode({}, TOKENS[:0], cache_bytes=cache_bytes)


def test_throughput_rows():
    models = loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(seed=1))
    rows = speed.throughput(models, TOKENS, cache_bytes=cache_bytes, contexts=[16, 600], prefill=64, new_tokens=2)
    found = {(row["metric"], row["length"]) for row in rows if "length" in row}
    assert {("prefill_tokens_per_second", 16), ("first_token_seconds", 16)} <= found and ("first_token_seconds", 600) not in found
    assert all(row["value"] >= 0 for row in rows)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [([-1.0, -1.0, 3.0], 4096 * 4**0.25), ([1.0, 1.0, 1.0], 1024), ([-1.0, 1.0, -1.0], None), ([1.0, -1.0, 1.0], 8192)],
)
def test_crossover_is_where_time_is_saved_from_then_on(saved, expected):
    assert speed.crossover([1024, 4096, 16384], saved) == (None if expected is None else pytest.approx(expected))
