"""The cell beside flash-linear-attention's naive references (fla-core) on the same random numbers: outputs and, where they return one, final state.

    pip install --no-deps --target FOLDER fla-core einops && PYTHONPATH=FOLDER:. pytest tests/linearize/test_conventions_fla.py

Where conventions differ, the test says how one is turned into the other. What holds for all of theirs: queries are multiplied by 1 / sqrt(K) inside,
states are [B, H, K, V], the gate of a token is that of the one that is written and fades the state before the write, as here.
Without a reference on the CPU (Triton only): lightning (its recurrence is simple_gla's with fixed decays), HGRN2 (gla's with k = 1 - a), MoBA. NSA's asks
for 16 or more queries per key. Its Titans minimises a layer-normed loss and is another rule than the preset's.

Key: B batch, T tokens, H heads, G key/value heads, R queries per key/value head, K key size, V value size, M slots, L levels.
"""

import importlib

import pytest
import torch
from tolerances import MIXER, assert_near

from subquad.kernels.additive import additive_chunk
from subquad.kernels.banded import banded_blocks
from subquad.kernels.delta import delta_chunk
from subquad.linearize.mixers import build
from subquad.linearize.mixers.base import AttentionCall, HeadShape
from subquad.linearize.mixers.decays import Fixed, KeyGate
from subquad.linearize.mixers.delta_levels import read_all_delta
from subquad.linearize.mixers.levels import LEVELS, read_all
from subquad.linearize.mixers.memory import open_parts
from subquad.linearize.mixers.products import quadratic
from subquad.linearize.mixers.slots import DAMPING
from subquad.linearize.state import MixerState

pytest.importorskip("fla", reason="compares with fla-core, which is not a dependency: pip install --no-deps fla-core einops")

B, T, H, K, V, D = 2, 150, 3, 16, 8, 24


def naive(module: str, function: str):
    return getattr(importlib.import_module(f"fla.ops.{module}.naive"), function)


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + len(size)))


def heads(*xs: torch.Tensor) -> list[torch.Tensor]:
    """[B, T, H, *] -> [B, H, T, *]."""
    return [x.transpose(1, 2) for x in xs]


q, k, v, start = randn(B, T, H, K) * 1.1, randn(B, T, H, K), randn(B, T, H, V), randn(B, H, K, V)
unit_k = torch.nn.functional.normalize(k, dim=-1)
beta, scalar, vector = torch.sigmoid(randn(B, T, H)), -randn(B, T, H).abs(), -randn(B, T, H, K).abs()
own_q = q.unsqueeze(3) * K**-0.5  # the scale is inside there, and R = 1


@pytest.mark.parametrize("function", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_gated_delta(function):
    out, last = naive("gated_delta_rule", function)(q, unit_k, v, beta=beta, g=scalar, initial_state=start, output_final_state=True)
    own, state = delta_chunk(own_q, unit_k, v, beta, scalar, start)
    assert_near(own.squeeze(3), out, MIXER)
    assert_near(state, last, MIXER)


def test_delta():
    """There heads come before tokens, and no decay exists."""
    out, last = naive("delta_rule", "delta_rule_recurrence")(*heads(q, unit_k, v, beta), initial_state=start)
    own, state = delta_chunk(own_q, unit_k, v, beta, None, start)
    assert_near(own.squeeze(3), out.transpose(1, 2), MIXER)
    assert_near(state, last, MIXER)


def test_gla():
    out, last = naive("gla", "naive_recurrent_gla")(q, k, v, vector, initial_state=start, output_final_state=True)
    own, state = additive_chunk(own_q, k, v, vector, start)
    assert_near(own.squeeze(3), out, MIXER)
    assert_near(state, last, MIXER)


def test_hgrn2_is_gla_with_what_was_not_kept():
    """HGRN2's layer calls the gla op with k = 1 - a; the preset's gate is log a of the teacher's keys."""
    log_a = KeyGate(HeadShape(D, H, 1, K, V), K, 0)(k)
    out, last = naive("gla", "naive_recurrent_gla")(q, 1 - log_a.exp(), v, log_a, output_final_state=True)
    state = MixerState()
    mixer = build("hgrn2", HeadShape(D, H, 1, K, V), 64, 4, {"combine": "alone", "output": "none", "normaliser": "none", "feature_map": "identity"})
    own = mixer(AttentionCall(own_q, k, v, randn(B, T, D), K**-0.5, fewest=T, state=state))
    assert_near(own.squeeze(3), out, MIXER)
    assert_near(memory_parts(mixer, state.memory)["sums"], last, MIXER)


@pytest.mark.parametrize("function", ["naive_chunk_simple_gla", "naive_recurrent_simple_gla"])
def test_simple_gla(function):
    out, last = naive("simple_gla", function)(q, k, v, scalar, initial_state=start, output_final_state=True)
    own, state = additive_chunk(own_q, k, v, scalar, start)
    assert_near(own.squeeze(3), out, MIXER)
    assert_near(state, last, MIXER)


def test_retention():
    out = naive("retention", "naive_retention")(*heads(q, k, v))
    own, _ = additive_chunk(own_q, k, v, Fixed.logs(H).expand(B, T, H))
    assert_near(own.squeeze(3), out.transpose(1, 2), MIXER)


def test_linear_attention_with_its_normaliser():
    """There the divisor is q . sum k + 1e-10; here it is a column of ones beside the values, so that the state holds both."""
    positive_q, positive_k = q.exp(), k.exp()
    out, (last, total) = naive("linear_attn", "naive_recurrent_linear_attn")(positive_q, positive_k, v, output_final_state=True, normalize=True)
    own, state = additive_chunk(positive_q.unsqueeze(3) * K**-0.5, positive_k, torch.cat([v, torch.ones(B, T, H, 1)], -1))
    assert_near((own[..., :V] / own[..., V:]).squeeze(3), out, MIXER)
    assert_near(state[..., :V], last, MIXER)
    assert_near(state[..., V], total.squeeze(1), MIXER)


def test_based():
    """1 + s + s^2 / 2 of s = q.k / sqrt(K). `taylorshift` and `fast2` use the same weight of the cosine instead; the features are [1; y; y x y / sqrt 2]."""

    def features(y: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(y[..., :1]), y, quadratic(y) / 2**0.5], -1)

    out = naive("based", "naive_parallel_based")(*heads(q, k, v))
    own, _ = additive_chunk(features(q * K**-0.5).unsqueeze(3), features(k), torch.cat([v, torch.ones(B, T, H, 1)], -1))
    assert_near((own[..., :V] / (own[..., V:] + 1e-6)).squeeze(3), out.transpose(1, 2), MIXER)


def test_power_features_are_rebased():
    """s^2 over its sum, as `power2`; there 1e-6 is added to the divisor."""
    out = naive("rebased", "naive_parallel_rebased")(*heads(q, k, v))
    own, _ = additive_chunk(quadratic(q * K**-0.5).unsqueeze(3), quadratic(k), torch.cat([v, torch.ones(B, T, H, 1)], -1))
    assert_near((own[..., :V] / (own[..., V:] + 1e-6)).squeeze(3), out.transpose(1, 2), MIXER)


def slots(name: str):
    """(output [B, T, H, V], memory by name, logits z [B, T, H, M]) of a slot preset over all tokens, with random gates."""
    shape = HeadShape(D, H, 1, K, V)
    mixer = build(name, shape, 64, 4, {"combine": "alone", "position": "keep"})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    hidden, state = randn(B, T, D), MixerState()
    with torch.no_grad():
        out = mixer(AttentionCall(q.unsqueeze(3), k, v, hidden, K**-0.5, fewest=T, state=state))
        z = getattr(mixer, mixer.rows.container.name)(hidden)
    return mixer, out.squeeze(3), state.memory, z


def test_gated_slots():
    """Slots: [B, G, M, K] here, [B, H, K, M] there; log f = log sigmoid(z) / 8, written 1 - f."""
    mixer, own, memory, z = slots("gsa")
    log_f = torch.nn.functional.logsigmoid(z) / DAMPING
    out, (keys, values) = naive("gsa", "naive_recurrent_gsa")(q, k, v, 1 - log_f.exp(), log_f, output_final_state=True)
    parts = memory_parts(mixer, memory)
    assert_near(own, out, MIXER)
    assert_near(parts["sums"].transpose(-1, -2), keys, MIXER)
    assert_near(parts["values"], values, MIXER)


def test_softmax_slots():
    """There slots are kept as averages; here as sums beside their total, so that they are divided when they are read. Heads come first there."""
    mixer, own, memory, z = slots("abc")
    out, (keys, values) = naive("abc", "naive_recurrent_abc")(*heads(q, k, v, z), output_final_state=True)
    parts = memory_parts(mixer, memory)
    assert_near(own, out.transpose(1, 2), MIXER)
    total = parts["total"].unsqueeze(-1)
    assert_near((parts["sums"] / total).transpose(-1, -2), keys, MIXER)
    assert_near(parts["values"] / total, values, MIXER)


def test_delta_slots():
    """Its slots' keys and values are two of their gated delta rules, with the slots' vector in the place of the key."""
    mixer, _, memory, z = slots("delta_slots")
    gates = torch.sigmoid(mixer.beta(randn(B, T, D))).squeeze(-1), mixer.decay(randn(B, T, D))
    s, parts = torch.nn.functional.normalize(z.exp(), dim=-1), memory_parts(mixer, memory)
    for name, x in (("sums", k), ("values", v)):
        _, last = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(s, s, x, beta=gates[0], g=gates[1], output_final_state=True)
        assert_near(parts[name], last, MIXER, name)


def memory_parts(mixer, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    return open_parts(memory, mixer.part_shapes, memory)


def test_log_linear():
    """There scales come as [B, T, H, L] without a 1 / sqrt(K) of their own; L = 9 levels hold 150 tokens, here there are always 12."""
    scales = randn(B, T, H, LEVELS).abs()
    out = naive("log_linear_attn", "naive_log_linear_attn")(q, k, v, scalar, scales[..., :9])
    own = read_all(q.unsqueeze(3), k, v, scalar, scales.unsqueeze(3))
    assert_near(own.squeeze(3), out, MIXER)


def test_log_linear_delta():
    """They have no log-linear delta rule: their mask of levels times the matrix of their gated delta rule, one of its columns a run with one value."""
    scales, H_ = randn(B, T, H, LEVELS).abs(), importlib.import_module("fla.ops.log_linear_attn.naive").construct_H_matrix
    rule, eye = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule"), torch.eye(T).expand(B, H, T, T).transpose(1, 2)
    matrix, _ = rule(q, unit_k, eye, beta=beta, g=scalar)  # [B, T, H, J]: the weight of token j for t
    mask = H_(torch.zeros(B, H, T), scales[..., :9].permute(0, 2, 3, 1))
    out = torch.einsum("bthj,bhtj,bjhv->bthv", matrix, mask, v)
    own = read_all_delta(own_q, unit_k, v, beta, scalar, scales.unsqueeze(3))
    assert_near(own.squeeze(3), out, MIXER)


@pytest.mark.parametrize("window", [None, 40])
def test_forgetting_attention(window):
    """`fox`: the running sum of the gates is the fade of op 3, one per key/value head (there: per query head)."""
    out = naive("forgetting_attn", "naive_forgetting_attn")(q, k, v, scalar, window_size=window)
    numerator, denominator, _ = banded_blocks(q.unsqueeze(3), k, v, window=window or T, scale=K**-0.5, fade_BXG=scalar.cumsum(1))
    assert_near((numerator / denominator.unsqueeze(-1)).squeeze(3), out, MIXER)
