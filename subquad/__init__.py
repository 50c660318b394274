"""subquad: pretrained softmax-attention models made sub-quadratic. Convert, distill, measure.

    plan = subquad.plan(model_or_config, mixer="window", window=64, sinks=4, exact=[0, 15])
    student = subquad.linearize(model, plan)      # the same ordinary PreTrainedModel, converted in place
    model = subquad.restore(student)              # and back
    subquad.distill(student, stages, data, folder=..., tokenizer=...)
    rows = subquad.evaluate(student, data, tasks, teacher=..., tokenizer=...)
    student = subquad.load("runs/quickstart/student")

After `import subquad`, AutoModelForCausalLM.from_pretrained opens a student folder like any other.
"""

import importlib
import sys
import types

import subquad.distill
import subquad.linearize  # registers students with transformers' auto classes
from subquad.errors import UserError
from subquad.linearize import Plan, plan, restore

__version__ = "0.1.0"
__all__ = ["Plan", "UserError", "distill", "evaluate", "linearize", "load", "plan", "restore"]


def load(folder, **kwargs):
    """The student saved in `folder`; kwargs go to from_pretrained."""
    return importlib.import_module("subquad.linearize.hub").load(folder, **kwargs)


def evaluate(*args, **kwargs):
    """Rows (model, metric, setting, value, ratio) of a student beside its teacher; see subquad.verbs.evaluate."""
    return importlib.import_module("subquad.verbs").evaluate(*args, **kwargs)


def _distill(*args, **kwargs):
    """Heal a converted model in place, stage by stage; see subquad.verbs.distill."""
    return importlib.import_module("subquad.verbs").distill(*args, **kwargs)


def _make_callable(module: types.ModuleType, function) -> None:
    """`subquad.linearize` and `subquad.distill` are packages and verbs at once: calling the package does what it is named for."""
    module.__class__ = type("Verb", (types.ModuleType,), {"__call__": staticmethod(function), "__doc__": function.__doc__})


_make_callable(sys.modules["subquad.linearize"], subquad.linearize.linearize)
_make_callable(sys.modules["subquad.distill"], _distill)
