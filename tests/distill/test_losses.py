import pytest
import torch
import torch.nn.functional as F

from subquad.distill.losses import IGNORE, LOGIT_LOSSES
from subquad.distill.losses.attention import attention_output
from subquad.distill.losses.head import Head, losses_from_hidden, losses_from_logits
from subquad.distill.losses.logits import kl
from subquad.registry import lookup

N, D, V = 23, 8, 50  # positions, hidden size, vocabulary: no chunk size divides N


def plain(student, teacher, labels, weights, temperature):
    """The definition, in float64, whole logits, autograd."""
    student, teacher = student.double(), teacher.double()
    total, counted = 0.0, labels != IGNORE
    if "kl" in weights:
        p, q = (F.log_softmax(x / temperature, -1) for x in (teacher, student))
        total = total + weights["kl"] * temperature**2 * (p.exp() * (p - q)).sum(-1)[counted].mean()
    if "cross_entropy" in weights:
        total = total + weights["cross_entropy"] * F.cross_entropy(student, labels, ignore_index=IGNORE)
    return total


def made(bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(N, D, generator=generator) for _ in range(2))
    heads = [Head(torch.randn(V, D, generator=generator), torch.randn(V, generator=generator) if bias else None) for _ in range(2)]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[[3, 4, -1]] = IGNORE
    return hidden, heads[0], teacher, heads[1], labels


def table(weights):
    return {name: (weight, lookup("loss", name, LOGIT_LOSSES)) for name, weight in weights.items()}


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [{"kl": 1.0}, {"cross_entropy": 0.5}, {"kl": 2.0, "cross_entropy": 0.1}], ids=str)
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_value_and_gradients_equal_the_definition(form, weights, temperature, chunk):
    hidden, head, teacher, teacher_head, labels = made()
    leaves = [hidden.requires_grad_(), head.weight.requires_grad_(), head.bias.requires_grad_()]
    expected = plain(head(hidden), teacher_head(teacher), labels, weights, temperature)
    gradients = torch.autograd.grad(expected, leaves)
    if form == "hidden":
        total, means = losses_from_hidden(hidden, head, teacher, teacher_head, labels, table(weights), temperature, chunk)
    else:
        total, means = losses_from_logits(head(hidden), teacher_head(teacher), labels, table(weights), temperature, chunk)
    (3 * total).backward()  # a factor after the loss, such as a loss scale, reaches the gradients
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(weights[name] * mean.item() for name, mean in means.items()) == pytest.approx(expected.item(), rel=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-4, atol=1e-5)
    assert hidden.grad[[3, 4, -1]].abs().max() == 0  # masked positions


def test_no_bias_and_a_frozen_head():
    hidden, head, teacher, teacher_head, labels = made(bias=False)
    total, _ = losses_from_hidden(hidden.requires_grad_(), head, teacher, teacher_head, labels, table({"kl": 1.0}))
    total.backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_kl_of_equal_logits_is_exactly_zero():
    logits = torch.randn(5, V)
    assert kl(logits, logits.clone()).abs().max() == 0


def test_low_precision_logits_are_compared_in_fp32():
    student, teacher = torch.randn(5, V).bfloat16().requires_grad_(), torch.randn(5, V).bfloat16()
    loss = kl(student, teacher)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, kl(student.detach().float(), teacher.float()))


def test_all_labels_masked_is_zero_not_nan():
    hidden, head, teacher, teacher_head, labels = made()
    total, _ = losses_from_hidden(hidden.requires_grad_(), head, teacher, teacher_head, labels.fill_(IGNORE), table({"kl": 1.0}))
    total.backward()
    assert total.item() == 0 and hidden.grad.abs().max() == 0


def test_attention_output_is_relative_and_masked():
    exact = torch.randn(2, 5, 4, 8)
    assert float(attention_output(exact, exact)) == 0
    assert float(attention_output(torch.zeros_like(exact), exact)) == pytest.approx(1.0)
    assert float(attention_output(1.1 * exact, exact)) == pytest.approx(0.01, rel=1e-4)
    assert float(attention_output(1100 * exact, 1000 * exact)) == pytest.approx(0.01, rel=1e-4)
    padding = torch.ones(2, 5, dtype=torch.long)
    padding[1, :3] = 0
    spoiled = exact.clone()
    spoiled[1, :3] += 100
    assert float(attention_output(spoiled, exact, padding)) == 0
