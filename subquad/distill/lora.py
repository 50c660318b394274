"""peft adapters inside the model itself: put in, switched off for the teacher's turn, merged away. Names are as before once merged."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from subquad.distill.stage import Lora
from subquad.errors import UserError


def add_lora(model: nn.Module, lora: Lora, targets: Sequence[str], seed: int = 0) -> dict[str, nn.Parameter]:
    """Wrap the linear modules `targets` (full names) with fp32 adapters that start as zero; returns the adapters' parameters by full name.

    The same seed gives the same adapters. Raises UserError when peft is missing or a model has adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("train: lora needs the package peft: pip install 'subquad[train]'.") from None
    if lora_layers(model):
        raise UserError("The model has LoRA adapters already. Merge them first (merge_lora).")
    if not targets:
        raise UserError("train: lora found no linear layer to adapt in this model. Use train: attention or train: mixers.")
    exact = "(" + "|".join(re.escape(name) for name in targets) + ")"  # as a pattern: peft matches a list by its endings too
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=exact, bias="none")
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for parameter, flag in trainable.items():  # peft freezes the model; what is trained is the stage's business
        parameter.requires_grad_(flag)
    added = {name: parameter for name, parameter in model.named_parameters() if parameter not in trainable}
    for parameter in added.values():
        parameter.data = parameter.data.float()  # updates of 1e-4 are lost in bf16
    return added


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped modules by full name."""
    if "peft" not in sys.modules:  # nobody imported it, so nothing is wrapped; importing it costs two seconds
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what it did before add_lora. A model without adapters is left alone."""
    layers = list(lora_layers(model).values())
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:  # enable_adapters switches these too
            parameter.requires_grad_(flag)


def merge_lora(model: nn.Module) -> None:
    """Add the adapters into the weights and put the plain modules back, in place."""
    for name, layer in lora_layers(model).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    vars(model).pop("peft_config", None)  # left there by peft; save_pretrained would take the model for an adapter


def dropout_on(model: nn.Module) -> None:
    """Training mode for the adapters' dropout alone; the rest of the model stays in the mode it has."""
    for layer in lora_layers(model).values():
        layer.lora_dropout.train()
