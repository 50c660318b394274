"""Which heads stay exact: scores from learned gates (or none), turned into a choice that fits the budget.

Shapes: G key/value heads of one layer. Source: DESIGN section 3 (one gate per KV head, L1 price).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from subquad.distill.data import Batches, Tokens
from subquad.distill.log import JsonLog
from subquad.distill.objectives import Objective, logits_objective, same_weights
from subquad.healing import follow_stage
from subquad.linearize import Plan, linearize, plan, restore, select
from subquad.linearize.modes import as_teacher, gated
from subquad.progress import Reporter
from subquad.recipe import BudgetSection, Recipe

Scores = dict[int, list[float]]  # layer -> a score per KV head; larger means: needs exact attention more


def plan_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's plan section as arguments of `plan`, without `exact`."""
    return recipe.plan.model_dump(exclude={"exact"})


def choose_heads(recipe: Recipe, config: Any, scores: Scores | None) -> Plan:
    """The plan whose exact heads are chosen by `scores` within the budget. UserError for an impossible budget, with what is possible."""
    chosen = recipe.select
    if chosen is None or chosen.method == "list":
        result = plan(config, exact=chosen.heads if chosen else recipe.plan.exact, **plan_arguments(recipe))
        return check_budget(result, recipe.budget)
    return select.choose(
        config,
        scores=scores,
        granularity=chosen.granularity,
        kv_bytes=recipe.budget.kv_bytes,
        at=recipe.budget.at,
        **plan_arguments(recipe),
    )


def check_budget(result: Plan, budget: BudgetSection | None) -> Plan:
    """`result`, if it keeps to the budget. A budget beside a hand-made choice of heads is a promise to check."""
    if budget:
        select.check(result, kv_bytes=budget.kv_bytes, at=budget.at)
    return result


def train_gates(model: PreTrainedModel, recipe: Recipe, tokens: Tokens, *, folder: Path, log: JsonLog, report: Reporter) -> Scores:
    """One gate per KV head, output = gate * exact + (1 - gate) * window, trained by KL to the teacher plus a price on keeping heads.

    `model` is the teacher; it is its own student while this runs, and is left as it was. Nothing but the gates is trained.
    """
    chosen = recipe.select
    stage = chosen.stage()
    everything = plan(model, mixer="window", window=recipe.plan.window, sinks=recipe.plan.sinks, layers=recipe.plan.layers)
    linearize(model, everything)
    with owned_gates(model, everything) as gates:
        follow_stage(
            stage,
            model=model,
            parameters={f"gates.{layer}": gate for layer, gate in gates.items()},
            objective=gates_objective(model, gates, chosen.price),
            batches=Batches(tokens, context=stage.context, batch=stage.batch, repeat=stage.repeat, seed=recipe.seed),
            folder=folder,
            log=log,
            report=report,
        )
        scores = {layer: gate.tolist() for layer, gate in gates.items()}
    restore(model)
    return scores


@contextmanager
def owned_gates(model: PreTrainedModel, everything: Plan) -> Iterator[dict[int, Parameter]]:
    """{layer: gates [G]}, all open (1); inside the block they belong to the model, whose own parameters the loop trains."""
    gates = {layer.index: Parameter(torch.ones(layer.kv_heads, device=model.device)) for layer in everything.converted}
    model.subquad_gates = torch.nn.ParameterList(gates.values())
    try:
        yield gates
    finally:
        del model.subquad_gates


def gates_objective(model: PreTrainedModel, gates: dict[int, Parameter], price: float) -> Objective:
    """KL of the gated model to the teacher + price * mean |gate|. The price is what makes heads that do not matter let go.

    Gates are free to leave [0, 1]: a clamp would stop their gradient there and make ties among the heads that matter most.
    """
    kl = logits_objective(model, same_weights(model, as_teacher), {"kl": 1.0})

    def objective(batch_BT: torch.Tensor, backward: Callable) -> dict[str, float]:
        cost = torch.cat(list(gates.values())).abs().mean()
        backward(price * cost)
        with gated(model, gates):
            numbers = kl(batch_BT, backward)
        return {**numbers, "open": cost.item()}

    return objective
