import sys

import pytest
import torch
from helpers import tiny_model
from torch import nn

from distill.student import projections, student
from subquad.distill.lora import adapters_off, add_lora, lora_layers, merge_lora
from subquad.distill.stage import Lora
from subquad.errors import UserError

IDS = torch.arange(12)[None]


def trained(model, **settings):
    """The model with adapters that do something."""
    parameters = add_lora(model, Lora(**settings), projections(model))
    for index, parameter in enumerate(parameters.values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    return parameters


def test_adapters_start_as_zero_and_only_they_are_new():
    model = student().requires_grad_(False)
    before, names = model(IDS).logits, set(dict(model.named_parameters()))
    parameters = add_lora(model, Lora(rank=3), projections(model))
    assert model(IDS).logits.equal(before)
    assert len(parameters) == 2 * 2 * 4 and all("lora_" in name for name in parameters)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(parameters)
    assert {name.replace(".base_layer", "") for name, _ in model.named_parameters()} - set(parameters) == names


def test_flags_of_the_rest_are_kept():
    model = tiny_model()
    add_lora(model, Lora(), projections(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_are_full_names_not_endings():
    model = tiny_model()
    add_lora(model, Lora(), ["model.layers.1.self_attn.q_proj"])
    assert list(lora_layers(model)) == ["model.layers.1.self_attn.q_proj"]


def test_the_same_seed_gives_the_same_adapters_and_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    models = [student() for _ in range(3)]
    torch.manual_seed(3)
    one, same, other = (add_lora(model, Lora(), projections(model), seed) for model, seed in zip(models, (1, 1, 2), strict=True))
    assert torch.rand(1) == expected
    assert all(one[name].equal(same[name]) for name in one) and any(not one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 keeps its projections transposed
def test_off_and_merged(family):
    config = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    model = tiny_model(family, **config)
    names, before = list(model.state_dict()), model(IDS).logits
    targets = projections(model) or [f"transformer.h.{layer}.attn.{part}" for layer in range(2) for part in ("c_attn", "c_proj")]
    for index, parameter in enumerate(add_lora(model, Lora(rank=4), targets).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    adapted = model(IDS).logits
    assert not adapted.allclose(before, atol=1e-2)
    with adapters_off(model):
        assert model(IDS).logits.equal(before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags and model(IDS).logits.equal(adapted)
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names and not lora_layers(model) and "peft_config" not in vars(model)


def test_merged_model_saves_as_an_ordinary_one(tmp_path):
    model = tiny_model()
    trained(model)
    merge_lora(model)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path)(IDS).logits.equal(model(IDS).logits)


def test_adapters_of_a_bf16_model_are_fp32():
    model = tiny_model().bfloat16()
    parameters = trained(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    merge_lora(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("twice", "said"), [(True, "adapters already"), (False, "no linear layer")])
def test_refusals(twice, said):
    model = tiny_model()
    if twice:
        trained(model)
    with pytest.raises(UserError, match=said):
        add_lora(model, Lora(), projections(model) if twice else [])


def test_a_model_without_adapters_does_not_import_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with adapters_off(tiny_model()):
        assert "peft" not in sys.modules
