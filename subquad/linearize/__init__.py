"""Rewrite a model's attention: plan it, carry it out, undo it, keep it."""

from transformers import PreTrainedModel

from subquad.linearize.plan import Plan
from subquad.linearize.planner import check_fits, plan
from subquad.linearize.student import convert, restore

__all__ = ["Plan", "linearize", "plan", "restore"]


def linearize(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Carry out a plan on a model in place and return the same, still ordinary, PreTrainedModel.

    Nothing is trained and no weights are copied. Raises UserError, before anything is touched, when the plan does not fit the model.
    """
    check_fits(model, plan)
    return convert(model, plan)
