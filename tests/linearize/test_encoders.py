"""Encoders and vision models through the same seam: conversion, padding, formulas of the direction-free cell, refusals.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K head size.
"""

import copy
from dataclasses import replace

import pytest
import torch
from linearize.students import randomise, tokens
from tolerances import FAMILY, MIXER, assert_near, error
from transformers import AutoConfig, AutoModel

import subquad
from subquad import UserError
from subquad.linearize.layout import padded
from subquad.linearize.mixers import MIXERS, build
from subquad.linearize.mixers.base import AttentionCall, HeadShape

BIDIRECTIONAL = [name for name, preset in MIXERS.items() if "bidirectional" in preset.directions]
SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 4}
FAMILIES = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 1},
    "distilbert": {"vocab_size": 257, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "attention_dropout": 0.0},
    "modernbert": {**SIZES, "pad_token_id": 0, "global_attn_every_n_layers": 1},
    "vit": IMAGE,
    "deit": IMAGE,
}
B, T, G, R, K = 3, 21, 2, 2, 8


def encoder(family: str):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, initializer_range=0.2, **FAMILIES[family])).eval()


def run(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    """Both layers are found and converted, the mixers bite, the teacher comes back, and padding changes nothing."""
    teacher = encoder(family)
    mixer = "lion_s" if family != "modernbert" else "mala"
    student = randomise(subquad.linearize(copy.deepcopy(teacher), subquad.plan(teacher, mixer=mixer)))
    assert len(student.subquad_plan.converted) == 2
    if family in ("vit", "deit"):
        given = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        given = {"input_ids": tokens(2, 16)}
    own = run(student, **given)
    assert error(own, run(teacher, **given)) > 100 * FAMILY
    if "input_ids" in given:
        mask = torch.tensor([[1] * 16, [1] * 9 + [0] * 7])
        out = run(student, **given, attention_mask=mask)
        alone = run(student, input_ids=given["input_ids"][1:, :9], attention_mask=mask[1:, :9])
        assert_near(out[1:, :9], alone, FAMILY)
    assert torch.equal(run(subquad.restore(student), **given), run(teacher, **given))


def test_arguments_are_read_by_name():
    """The third one of an encoder is token types: they are no positions that start anew."""
    teacher = encoder("bert")
    student = randomise(subquad.linearize(teacher, subquad.plan(teacher, mixer="linear")))
    ids, types = tokens(2, 16), torch.tensor([[0] * 9 + [1] * 7] * 2)
    with torch.no_grad():
        assert torch.equal(student(ids, None, types).last_hidden_state, run(student, input_ids=ids, token_type_ids=types))


def call_of(name: str, batch: int = B) -> AttentionCall:
    g = torch.Generator().manual_seed(len(name))
    q, k, v, x = (torch.randn(batch, T, *size, generator=g) for size in ((G, R, K), (G, K), (G, K), (24,)))
    return AttentionCall(q, k, v, x, K**-0.5, fewest=T, causal=False)


def mixer_of(name: str):
    mixer = build(name, HeadShape(24, G, R, K, K), 4, 1, {"combine": "alone"} if MIXERS[name].uses == "cell" else {})
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return mixer


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_padding_order_and_gradients(name):
    """Filler changes nothing; without decay or position the order of tokens changes nothing; all-filler rows and large logits stay finite."""
    mixer, call = mixer_of(name), call_of(name)
    whole = mixer(call)
    mask = torch.zeros(B, T, dtype=torch.long)
    for row, n in enumerate((T, 13, 0)):
        mask[row, T - n :] = 1
    layout = padded(mask)
    moved = {n: layout.gather(getattr(call, n)) for n in ("q_BTGRK", "k_BTGK", "v_BTGV", "hidden_BTD")}
    out = layout.scatter(mixer(replace(call, **moved, real_BT=layout.real_DL, fewest=layout.fewest)), B, T)
    assert out.isfinite().all()
    assert_near(out[0], whole[0], MIXER)
    last = {n: getattr(call, n)[1:2, T - 13 :] for n in moved}
    assert_near(out[1:2, T - 13 :], mixer(replace(call, **last, fewest=13)), MIXER)
    if name not in ("lion_d", "lion_s", "cosformer", "agent", "relative"):
        order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
        shuffled = mixer(replace(call, **{n: getattr(call, n)[:, order] for n in moved}))
        assert_near(shuffled, whole[:, order], MIXER, "order")
    leaf = (call.q_BTGRK * 30).requires_grad_()
    large = mixer(replace(call, q_BTGRK=leaf))
    large.square().sum().backward()
    assert large.isfinite().all() and leaf.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", [name for name in BIDIRECTIONAL if MIXERS[name].uses == "cell"])
def test_the_last_query_of_a_decoder_reads_the_same(name):
    """The last token of a causal mixer over all tokens has seen everything: without decay and key weights it is the encoder's row."""
    mixer, call = mixer_of(name), call_of(name)
    if mixer.decay is not None or mixer.pieces["key_weight"] != "none":
        pytest.skip("decays and key weights differ between the directions by definition")
    assert_near(mixer(replace(call, causal=True))[:, -1], mixer(call)[:, -1], MIXER)


@pytest.mark.parametrize("name", ["lion_lit", "lion_d", "lion_s"])
def test_lion_is_its_matrix(name):
    """A_ij = phi(q_i).phi(k_j) times the decays of tokens j .. i-1 (j < i) or i+1 .. j (j > i), over its row sums."""
    mixer, call = mixer_of(name), call_of(name)
    log = torch.zeros(B, T, G) if mixer.decay is None else mixer.decay(call.hidden_BTD)
    M = torch.zeros(B, G, T, T)
    for i in range(T):
        for j in range(T):
            M[:, :, i, j] = (log[:, j:i] if j <= i else log[:, i + 1 : j + 1]).sum(1).exp()
    weights = torch.einsum("btgrk,bjgk->bgrtj", mixer.map_q(call.q_BTGRK), mixer.map_k(call.k_BTGK)) * M[:, :, None]
    wanted = torch.einsum("bgrtj,bjgv->btgrv", weights / weights.sum(-1, keepdim=True), call.v_BTGV)
    assert_near(mixer(call), wanted, MIXER)


def test_inline_rala_flow_and_mala_are_their_formulas():
    elu1, call = (lambda x: torch.nn.functional.elu(x) + 1), call_of("x")
    scale, v, pairs = K**-0.25, call.v_BTGV, lambda q, k: torch.einsum("btgrk,bjgk->bgrtj", q, k)
    read = lambda w: torch.einsum("bgrtj,bjgv->btgrv", w, v)  # noqa: E731

    s = pairs(elu1(call.q_BTGRK), elu1(call.k_BTGK)) / K**0.5
    z, mean = s.sum(-1, keepdim=True), s.mean(-1, keepdim=True)
    assert_near(bare("mala_sum")(call), read(s / z + s - mean), MIXER, "mala: s / Z + (s - mean s)")
    assert_near(bare("mala")(call), read(s / z + (s - mean) / T), MIXER, "mala, token means")
    s = pairs(call.q_BTGRK, call.k_BTGK) / K**0.5
    assert_near(bare("inline")(call), read((s + 1 - s.mean(-1, keepdim=True)) / T), MIXER, "inline: (s + 1 - mean s) / T")

    q, k = elu1(call.q_BTGRK * scale), elu1(call.k_BTGK * scale)
    s = pairs(q, k)
    alpha = T * (torch.einsum("bgk,bjgk->bjg", q.mean((1, 3)), call.k_BTGK) / K**0.5).softmax(1)
    weights = s * alpha.permute(0, 2, 1)[:, :, None, None]
    assert_near(bare("rala")(call), read(weights / weights.sum(-1, keepdim=True)), MIXER, "rala")

    q, k = torch.sigmoid(call.q_BTGRK * scale), torch.sigmoid(call.k_BTGK * scale)
    incoming = torch.einsum("btgrk,bgk->btgr", q, k.sum(1))
    outgoing = torch.einsum("btgk,bgk->btg", k, q.mean(3).sum(1))
    flow_in = torch.einsum("btgrk,bgk->btgr", q, (k / outgoing[..., None]).sum(1))
    flow_out = torch.einsum("btgk,bgk->btg", k, (q / incoming[..., None]).mean(3).sum(1)).clamp(-1, 1)
    weighted = v * flow_out.softmax(1)[..., None] * T
    wanted = torch.sigmoid(flow_in)[..., None] * torch.einsum("btgrk,bjgk,bjgv->btgrv", q / incoming[..., None], k, weighted)
    assert_near(bare("flowformer")(call), wanted, MIXER, "flowformer")


def test_agents_and_relative_positions_are_their_formulas():
    call = call_of("x")
    agent = build("agent", HeadShape(24, G, R, K, K), 4, 1, {"agents": 3})
    pooled = call.q_BTGRK.unflatten(1, (3, 7)).mean(2)
    inner = (torch.einsum("bmgrk,btgk->bgrmt", pooled, call.k_BTGK) * call.scale).softmax(-1)
    outer = (torch.einsum("btgrk,bmgrk->bgrtm", call.q_BTGRK, pooled) * call.scale).softmax(-1)
    assert_near(agent(call), torch.einsum("bgrtm,bgrmj,bjgv->btgrv", outer, inner, call.v_BTGV), MIXER, "agent")

    mixer = mixer_of("relative")
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    b = mixer.bias[:, (i - j).clamp(-mixer.span, mixer.span) + mixer.span]
    q, k = (mixer.map(torch.nn.functional.normalize(x, dim=-1)).exp() for x in (call.q_BTGRK, call.k_BTGK))
    weights = torch.einsum("btgrf,bjgf->bgrtj", q, k) * b.exp()[:, None]
    assert_near(mixer(call), torch.einsum("bgrtj,bjgv->btgrv", weights / weights.sum(-1, keepdim=True), call.v_BTGV), MIXER, "relative")


def bare(name: str):
    """The mixer as built, without what follows the read."""
    mixer = build(name, HeadShape(24, G, R, K, K), 4, 1, {"combine": "alone", "output": "none"})
    return mixer


def test_refusals(tiny_llama, tmp_path):
    student = subquad.linearize(encoder("bert"), subquad.plan(encoder("bert"), mixer="lion_lit"))
    with pytest.raises(UserError, match="is an encoder"):
        student.save_pretrained(tmp_path / "student")
    assert not (tmp_path / "student").exists()
    with pytest.raises(UserError, match="is bidirectional and mixer 'gated_delta' is not"):
        subquad.plan(encoder("bert"), mixer="gated_delta")
    with pytest.raises(UserError, match="container levels has a direction, and the model's attention has none: use container plain"):
        subquad.plan(encoder("bert"), mixer="linear", options={"container": "levels"})
    with pytest.raises(UserError, match=r"decay vector has a direction.*: use decay none"):
        subquad.plan(encoder("bert"), mixer="linear", options={"decay": "vector"})
    with pytest.raises(UserError, match="is causal and mixer 'lion_s' is not"):
        subquad.plan(tiny_llama, mixer="lion_s")
