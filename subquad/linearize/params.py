"""Which parameters of a converted model belong to what."""

import torch.nn as nn
from torch.nn import Parameter

from subquad.linearize.seam import seams


def mixer_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Full name -> parameter of every mixer."""
    return _inside(model, lambda inner: inner.startswith("mixer."))


def attention_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Full name -> parameter of the converted attention modules, mixers included."""
    return _inside(model, lambda inner: True)


def linear_names(model: nn.Module) -> list[str]:
    """Names of the teacher's linear layers inside converted attention modules: where LoRA goes."""
    names = _names(model)
    return [
        f"{names[seam.module]}.{inner}"
        for seam in seams(model)
        for inner, m in seam.module.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and not inner.startswith("mixer")
    ]


def _inside(model: nn.Module, wanted) -> dict[str, Parameter]:
    names = _names(model)
    return {f"{names[s.module]}.{inner}": p for s in seams(model) for inner, p in s.module.named_parameters() if wanted(inner)}


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {m: name for name, m in model.named_modules()}
