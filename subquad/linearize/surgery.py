"""Carry out a plan on a model, and undo it. The only code that changes modules.

Everything is checked before the first module is touched, so a refused plan leaves the model as it was.
"""

import torch
import torch.nn as nn

from subquad.errors import UserError, raise_all
from subquad.linearize.calls import ModelHooks, Root
from subquad.linearize.mixers import build
from subquad.linearize.plan import Plan
from subquad.linearize.seam import LayerSeam, seams


def attach(model: nn.Module, plan: Plan) -> None:
    """Put the plan's mixers into the model. Parameters are created on each layer's device in fp32 (gates and maps are small)."""
    modules = dict(model.named_modules())
    problems = [
        f"The plan names {layer.name!r}, which {type(model).__name__} does not have."
        for layer in plan.converted
        if layer.name not in modules
    ]
    if seams(model):
        problems.append("This model is already converted: call subquad.restore(model) first.")
    raise_all(problems)
    root = Root()
    for layer in plan.converted:
        module = modules[layer.name]
        mixer = build(layer.mixer, layer.soft_shape, layer.window, layer.sinks, plan.options)
        mixer.total_kv_heads = layer.kv_heads
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        module.mixer = mixer.to(device)
        LayerSeam(module, layer.index, layer.exact, layer.kv_heads, root, layer.teacher_window).attach()
    model.subquad_hooks = ModelHooks(model, root)
    model.subquad_plan = plan


def detach(model: nn.Module) -> None:
    """Take everything out again: the model is the teacher with its present weights. UserError for a model that is not converted."""
    plan_of(model)
    for seam in seams(model):
        seam.detach()
        del seam.module.mixer
    model.subquad_hooks.remove()
    del model.subquad_hooks, model.subquad_plan


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model was converted by. UserError for one that is not converted."""
    plan = getattr(model, "subquad_plan", None)
    if plan is None:
        raise UserError(
            f"This {type(model).__name__} is not converted: call subquad.linearize(model, plan) first, or subquad.load a student."
        )
    return plan
