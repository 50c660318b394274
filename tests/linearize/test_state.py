"""The memory of a converted layer inside transformers' caches."""

import pytest
import torch
from helpers import tiny_model
from linearize.students import chunked, full, student_of, tokens
from tolerances import FAMILY, assert_near
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from subquad import UserError
from subquad.linearize.state import MixerState, cache_bytes, state_of

HALF = {0: [1], 1: [1], 2: [1]}


@pytest.fixture(scope="module")
def student():
    return student_of(tiny_model(), mixer="gated_delta", window=4, sinks=2, exact=HALF)


def filled(student, batch: int = 3, length: int = 12):
    ids = tokens(batch, length)
    return ids, chunked(student, ids, [length])[1]


def test_state_takes_the_place_of_the_stock_layer(student):
    _, cache = filled(student)
    assert [type(layer) for layer in cache.layers] == [MixerState] * 3
    layer = cache.layers[0]
    assert layer.keys.shape == (3, 1, 12, 16) and layer.window_k.shape == (3, 4, 1, 16) and layer.sink_k.shape == (3, 2, 1, 16)
    assert layer.memory.shape == (3, 1, 16, 16) and layer.memory.dtype == torch.float32
    assert cache.get_seq_length() == 12 and layer.seen_B.tolist() == [12] * 3


def test_unconverted_layers_keep_stock_ones():
    cache = filled(student_of(tiny_model(), window=4, sinks=2, exact=[1]))[1]
    assert [type(layer).__name__ for layer in cache.layers] == ["MixerState", "DynamicLayer", "MixerState"]


ROWS = {
    "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
    "batch_select_indices": (torch.tensor([1]), [1]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("method", ROWS)
def test_rows_move_together(student, method):
    """After the rows of a cache are moved, it continues as the rows that were moved there."""
    argument, rows = ROWS[method]
    ids, cache = filled(student)
    getattr(cache, method)(argument)
    with torch.no_grad():
        out = student(input_ids=ids[rows, :1], past_key_values=cache, use_cache=True).logits
    assert_near(out, full(student, torch.cat([ids, ids[:, :1]], 1))[rows, -1:], FAMILY)


def test_reset_forgets(student):
    ids, cache = filled(student)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0
    with torch.no_grad():
        assert_near(student(input_ids=ids, past_key_values=cache, use_cache=True).logits, full(student, ids), FAMILY)


def test_cache_bytes_counts_every_tensor(student):
    _, cache = filled(student)
    layer = cache.layers[0]
    exact, window, sinks, memory = 2 * 12 * 16 * 4, 2 * 4 * 16 * 4 + 4 * 4, 2 * 2 * 16 * 4, 16 * 16 * 4
    assert sum(x.numel() * x.element_size() for x in layer.tensors()) == 3 * (exact + window + sinks + memory + 8)
    assert cache_bytes(cache) == 3 * sum(x.numel() * x.element_size() for x in layer.tensors())
    stock = DynamicCache()
    stock.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    assert cache_bytes(stock) == 2 * 2 * 5 * 8 * 4


def test_a_window_holds_no_view_of_the_prompt(student):
    """A view of the last tokens would keep the whole prompt's keys in memory."""
    _, cache = filled(student, length=400)
    for name in ("window_k", "window_v", "sink_k", "sink_v"):
        x = getattr(cache.layers[0], name)
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name


def test_static_cache_is_refused_by_name(student):
    cache = StaticCache(config=student.config, max_cache_len=32)
    with pytest.raises(UserError, match=r"Static.* cannot hold the state.*default dynamic cache"):
        student(input_ids=tokens(1, 5), past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="Static"):
        student.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static")


class QuantizedLayer(type(DynamicCache().layer_class_to_replicate())):
    """Stands for transformers' QuantizedLayer, which needs a package for its arithmetic."""


def test_quantized_cache_is_refused_by_name(student):
    cache = DynamicCache()
    cache.layers = [QuantizedLayer() for _ in range(3)]
    with pytest.raises(UserError, match="QuantizedLayer cannot hold the state"):
        student(input_ids=tokens(1, 5), past_key_values=cache, use_cache=True)


def test_offloaded_cache_is_refused_by_name():
    cache = DynamicCache()
    cache.offloading = True  # what DynamicCache(offloading=True) sets where there is an accelerator to offload from
    with pytest.raises(UserError, match="without offloading"):
        state_of(cache, 0)


def test_cache_of_another_model_is_refused(student):
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        tiny_model()(input_ids=tokens(1, 5), past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="filled by another model \\(5 tokens\\)"):
        student(input_ids=tokens(1, 5), past_key_values=cache, use_cache=True)


def test_cache_with_too_few_layers_is_refused():
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    with pytest.raises(UserError, match="0 layers but layer 2"):
        state_of(cache, 2)


def test_going_back_is_refused(student):
    ids, cache = filled(student)
    with pytest.raises(UserError, match="no way back"):
        cache.layers[0].crop(-2)
    with pytest.raises(ValueError, match=r"no way back|crop|rollback"):
        student.generate(ids[:1].repeat(1, 3), max_new_tokens=8, min_new_tokens=8, prompt_lookup_num_tokens=2, do_sample=False)
