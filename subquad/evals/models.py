"""How tasks get at models: functions that open a context, so that one set of weights can be teacher and student in turn."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

Opener = Callable[[], AbstractContextManager[PreTrainedModel]]
Models = Mapping[str, Opener]


def loaded(**models: PreTrainedModel) -> dict[str, Opener]:
    """Openers of models that are in memory: loaded(teacher=..., student=...)."""
    return {name: lambda model=model: nullcontext(model) for name, model in models.items()}


@contextmanager
def measuring(opener: Opener) -> Iterator[PreTrainedModel]:
    """The model, in eval mode and without gradients, for the length of a with block."""
    with opener() as model, torch.inference_mode():
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield model
        finally:
            for module in training:
                module.training = True
