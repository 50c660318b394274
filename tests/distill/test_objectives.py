from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model

from distill.student import as_teacher, mixers, student, transfer
from subquad.distill.losses import IGNORE
from subquad.distill.objectives import has_plain_head, live_teacher, logits_objective, next_tokens, same_weights, transfer_objective

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("family", "config", "plain"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, True),
        ("gpt_neox", {}, True),
        ("phi", {}, True),  # a head with a bias
        ("gemma2", {"head_dim": 16}, False),  # softcap 30: invisible at the logits of a random model
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("bert", {"is_decoder": True}, False),  # a transform before the projection
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_heads_are_recognised_by_their_numbers(family, config, plain, dtype):
    model = tiny_model(family, **config).to(dtype)
    assert has_plain_head(model, IDS[:1, :8]) is plain
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma2", {"head_dim": 16}), ("phi", {})]
)
def test_logit_losses_equal_the_definition(family, config):
    """Through the head chunks where the head is plain, through whole logits where it is not."""
    model, teacher = tiny_model(family, seed=1, **config), tiny_model(family, seed=2, **config)
    objective = logits_objective(model, live_teacher(teacher), {"kl": 1.0, "cross_entropy": 0.5}, temperature=2.0, chunk=5)
    values = objective(IDS, torch.Tensor.backward)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits, expected = model(IDS).logits[:, :-1].double(), teacher(IDS).logits[:, :-1].double().detach()
    kl = 4 * F.kl_div(F.log_softmax(logits / 2, -1), F.log_softmax(expected / 2, -1), log_target=True, reduction="none").sum(-1).mean()
    ce = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    (kl + 0.5 * ce).backward()
    assert values == pytest.approx({"loss": (kl + 0.5 * ce).item(), "kl": kl.item(), "cross_entropy": ce.item()}, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_cross_entropy_alone_asks_no_teacher():
    model = student()
    values = logits_objective(model, None, {"cross_entropy": 1.0})(IDS, torch.Tensor.backward)
    assert set(values) == {"loss", "cross_entropy"}
    with pytest.raises(AssertionError, match="need a teacher"):
        logits_objective(model, None, {"kl": 1.0})


def test_one_copy_of_the_weights_is_teacher_and_student():
    model = student()
    objective = logits_objective(model, same_weights(model, as_teacher), {"kl": 1.0})
    assert objective(IDS, torch.Tensor.backward)["kl"] > 1e-3
    for parameter in mixers(model).values():
        parameter.data.fill_(1.0)  # now the student is the teacher
    assert objective(IDS, torch.Tensor.backward)["kl"] == 0
    assert not model.exact


def test_frozen_weights_cost_no_gradient():
    model = student().requires_grad_(False)
    for parameter in mixers(model).values():
        parameter.requires_grad_(True)
    logits_objective(model, same_weights(model, as_teacher), {"kl": 1.0})(IDS, torch.Tensor.backward)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(mixers(model))


def test_transfer_is_layer_local_and_goes_backward_per_layer():
    model, calls = student().requires_grad_(False), []
    for parameter in mixers(model).values():
        parameter.requires_grad_(True)

    def backward(loss):
        loss.backward()
        calls.append(sum(parameter.grad is not None for parameter in mixers(model).values()))

    values = transfer_objective(model, transfer, {"attention_output": 2.0})(IDS, backward)
    assert calls == [1, 2]  # one layer's graph at a time
    # factors of 0.5 leave a quarter of the square
    assert values == pytest.approx({"loss": 0.5, "attention_output": 0.25, "layer 0": 0.5, "layer 1": 0.5})
    mixers(model)[max(mixers(model))].data.fill_(1.0)  # this layer is exact now, and the log says which
    values = transfer_objective(model, transfer, {"attention_output": 2.0})(IDS, lambda loss: None)
    assert values == pytest.approx({"loss": 0.25, "attention_output": 0.125, "layer 0": 0.5, "layer 1": 0.0})
    assert model.on_layer is None and {name for name, p in model.named_parameters() if p.grad is not None} == set(mixers(model))


def test_transfer_that_reaches_no_layer_is_our_bug():
    with pytest.raises(AssertionError, match="no converted layer"):
        transfer_objective(tiny_model(), lambda model, on_layer: nullcontext(), {"attention_output": 1.0})(IDS, torch.Tensor.backward)


def test_labels_are_the_next_tokens():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE]]
