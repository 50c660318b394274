"""Perplexity, by position, repeat and agreement against their plain definitions: full logits, log_softmax, fp64."""

import math
import statistics

import helpers
import pytest
import torch

from subquad.evals import evaluate
from subquad.evals.agreement import agreement
from subquad.evals.logits import CHUNK, Logits
from subquad.evals.models import loaded
from subquad.evals.perplexity import by_position, perplexity
from subquad.evals.repeat import repeat

RTOL = 1e-5  # fp32 logits, chunked and whole products of other shapes


@pytest.fixture
def tokens():
    return torch.randint(257, (1500,), generator=torch.Generator().manual_seed(1))


def logprobs(model, ids):
    """[T, V] fp64."""
    with torch.no_grad():
        return model(ids[None]).logits[0].double().log_softmax(-1)


def nll(model, ids, first=1):
    """-ln p of ids[first:]."""
    scores = logprobs(model, ids)
    return [-scores[place - 1, ids[place]].item() for place in range(first, len(ids))]


def perplexity_of(values):
    return math.exp(sum(values) / len(values))


# 2: one prediction a block; CHUNK + 1: exactly one chunk; CHUNK + 38: a short last chunk
@pytest.mark.parametrize(("context", "windows"), [(2, 3), (37, 5), (CHUNK + 1, 1), (CHUNK + 38, 2)])
def test_perplexity(tiny_llama, tokens, context, windows):
    (row,) = perplexity(loaded(teacher=tiny_llama), tokens, context=context, windows=windows)
    plain = [value for i in range(windows) for value in nll(tiny_llama, tokens[i * context : (i + 1) * context])]
    assert row["value"] == pytest.approx(perplexity_of(plain), rel=RTOL)
    assert row["setting"] == f"{windows} x {context} tokens"


def test_standard_errors_are_over_passages(tiny_llama, tokens):
    """Of the perplexity, and of the ratio on the same passages; equal passages have none."""
    other = helpers.tiny_model(seed=5)
    by_block = {model: [perplexity_of(nll(model, tokens[i * 20 : (i + 1) * 20])) for i in range(4)] for model in (tiny_llama, other)}
    logs = {model: [math.log(value) for value in values] for model, values in by_block.items()}
    first, second = perplexity(loaded(teacher=tiny_llama, student=other), tokens, context=20, windows=4)
    assert first["n"] == 4 and "ratio_stderr" not in first
    assert first["stderr"] == pytest.approx(first["value"] * statistics.stdev(logs[tiny_llama]) / 2, rel=1e-4)
    gaps = [a - b for a, b in zip(logs[other], logs[tiny_llama], strict=True)]
    assert second["ratio_stderr"] == pytest.approx(second["value"] / first["value"] * statistics.stdev(gaps) / 2, rel=1e-4)
    same = torch.cat([tokens[:20]] * 3)
    assert perplexity(loaded(teacher=tiny_llama), same, context=20, windows=3)[0]["stderr"] == pytest.approx(0, abs=1e-4)
    assert perplexity(loaded(teacher=tiny_llama), same, context=20, windows=1)[0]["stderr"] is None


def test_all_windows_that_fit(tiny_llama, tokens):
    (row,) = perplexity(loaded(teacher=tiny_llama), tokens[:107], context=20, windows=None)
    assert row["setting"] == "5 x 20 tokens"


def test_stride_counts_every_token_once(tiny_llama, tokens):
    context, stride, windows = 23, 7, 4
    (row,) = perplexity(loaded(teacher=tiny_llama), tokens, context=context, windows=windows, stride=stride)
    plain = nll(tiny_llama, tokens[:context])
    for end in range(context + stride, context + windows * stride, stride):
        plain += nll(tiny_llama, tokens[end - context : end], first=context - stride)
    assert len(plain) == context + (windows - 1) * stride - 1
    assert row["value"] == pytest.approx(perplexity_of(plain), rel=RTOL)
    assert row["setting"] == "4 x 23 tokens, stride 7"


@pytest.mark.parametrize(("context", "edges"), [(37, [1, 4, 9, 18, 37]), (64, [1, 8, 16, 32, 64])])
def test_by_position(tiny_llama, tokens, context, edges):
    rows = by_position(loaded(teacher=tiny_llama), tokens, context=context, windows=3, buckets=4)
    assert len(rows) == 4
    for row, start, stop in zip(rows, edges, edges[1:], strict=False):
        wholes = [nll(tiny_llama, tokens[i * context : (i + 1) * context]) for i in range(3)]
        plain = [value for whole in wholes for value in whole[start - 1 : stop - 1]]
        assert row["value"] == pytest.approx(perplexity_of(plain), rel=RTOL)
        assert row["setting"] == f"positions {start}-{stop - 1} of 3 x {context} tokens"


def test_by_position_buckets_make_up_perplexity(tiny_llama, tokens):
    (whole,) = perplexity(loaded(teacher=tiny_llama), tokens, context=33, windows=2)
    (same,) = by_position(loaded(teacher=tiny_llama), tokens, context=33, windows=2, buckets=1)
    assert same["value"] == whole["value"]


def test_repeat(tiny_llama, tokens):
    rows = repeat(loaded(teacher=tiny_llama), tokens, length=[2, 31], samples=3, seed=5)
    for row, length in zip(rows, (2, 31), strict=True):
        starts = torch.randint(len(tokens) - length + 1, (3,), generator=torch.Generator().manual_seed(5)).tolist()
        twice = [torch.cat([tokens[start : start + length]] * 2) for start in starts]
        plain = [value for ids in twice for value in nll(tiny_llama, ids, first=length + 1)]
        assert row["value"] == pytest.approx(perplexity_of(plain), rel=RTOL)
        assert row["setting"] == f"{length} + {length} tokens, 3 samples, seed 5"


def test_repeat_of_the_whole_text(tiny_llama, tokens):
    assert repeat(loaded(teacher=tiny_llama), tokens[:40], length=40, samples=1)


@pytest.mark.parametrize("context", [2, 45, CHUNK + 3])
def test_agreement(tiny_llama, tokens, context):
    student = helpers.tiny_model(seed=1)
    rows = agreement(loaded(teacher=tiny_llama, student=student), tokens, context=context, windows=2)
    found = {(row["model"], row["metric"]): row["value"] for row in rows}
    kls, same = [], []
    for ids in (tokens[:context], tokens[context : 2 * context]):
        p, q = logprobs(tiny_llama, ids), logprobs(student, ids)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert found["student", "kl_to_teacher"] == pytest.approx(torch.cat(kls).mean().item(), rel=RTOL)
    assert found["student", "top1_agreement"] == pytest.approx(torch.cat(same).double().mean().item())
    assert (found["teacher", "kl_to_teacher"], found["teacher", "top1_agreement"]) == (0, 1)


def test_agreement_with_itself(tiny_llama, tokens):
    rows = agreement(loaded(teacher=tiny_llama, student=tiny_llama), tokens, context=50, windows=1)
    assert [row["value"] for row in rows[2:]] == [pytest.approx(0, abs=1e-6), 1]


# A head that is a plain product is chunked; a scale or softcap after it is noticed although no config key is asked for.
@pytest.mark.parametrize(
    ("family", "config", "chunked"),
    [
        ("llama", {}, True),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, True),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}, False),
        ("granite", {"logits_scaling": 3.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_heads(tokens, family, config, chunked):
    model, ids = helpers.tiny_model(family, **config), tokens[:70]
    with torch.inference_mode():
        logits = Logits(model, ids)
        assert (logits.head is not None) == chunked
        torch.testing.assert_close(torch.cat([part for _, part in logits.chunks()]), model(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_scores_are_made_in_fp32(tokens):
    model = helpers.tiny_model().to(torch.bfloat16)
    with torch.inference_mode():
        assert Logits(model, tokens[:30])[slice(0, 3)].dtype == torch.float32
    (row,) = perplexity(loaded(teacher=model), tokens, context=30, windows=2)
    assert math.isfinite(row["value"])


def test_model_is_left_as_it_was(tiny_llama, tokens):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    before = [module.training for module in tiny_llama.modules()]
    weights = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    tasks = {"perplexity": {"context": 20, "windows": 1}, "agreement": {"context": 20, "windows": 1}}
    evaluate(loaded(teacher=tiny_llama, student=tiny_llama), tokens, tasks)
    assert [module.training for module in tiny_llama.modules()] == before
    assert all(torch.equal(value, weights[name]) for name, value in tiny_llama.state_dict().items())
