"""Two-layer models trained from scratch on a token-level recall task, one mixer each: what a mixer can remember before any conversion.

The model is a small llama whose attention is rewritten by the same plan as any other model's, so what is trained is what a student would run.

Key: B batch, T tokens, V letters.
"""

import inspect
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from subquad.distill.stage import Count, Positive, Share, Whole
from subquad.errors import UserError, raise_all
from subquad.evals.paired import mean, stderr
from subquad.evals.rows import Row, arrange, row
from subquad.evals.synthetic import NO_LABEL, TOKEN_TASKS, Batch, token_task
from subquad.linearize import linearize, plan
from subquad.linearize.mixers import MIXERS, pieces
from subquad.progress import Reporter
from subquad.registry import check_name, lookup
from subquad.settings import apply_sets, validate

SOFTMAX = "softmax"  # the name of the model that is left as it is
VOCABULARY = 256  # ids a token task may use


# What is smaller at the start of training: an eighth (at least 2), a quarter, a half, all of it. Blanks between question and answer come last: at two
# pairs without blanks a softmax model finds out how to match within 300 steps, at four pairs and 16 blanks some seeds need more than 2,000.
LADDER = {"mqar": ("pairs", "queries"), "copying": ("length",), "selective_copying": ("length", "noise"), "induction": ()}
RUNGS = ((8, 0.25), (4, 0.2), (2, 0.2), (1, 0.35))  # (divisor, share of the steps)
BLANKS_FROM = 2  # the largest divisor that has its blanks
SOLVED = 0.95  # training accuracy at which the next rung begins


class Budget(BaseModel):
    """How a model is trained: AdamW without weight decay, warm-up over a tenth of the steps, then a cosine to a tenth of lr.

    The task starts easy (LADDER) and gets harder when a rung is solved or its share of the steps is used up: without that, attention stays for
    thousands of steps at "any of the values seen" before it finds the right one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Count = 2400
    batch: Count = 64
    lr: Positive = 3e-3
    hidden: Count = 64
    layers: Count = 2
    heads: Count = 4
    window: Count = 8  # tokens
    sinks: Whole = 1  # tokens
    seed: Whole = 0
    test_batches: Count = 8
    enough: Share = 0.999  # stop when a batch of training is right to this share


class Asked(BaseModel):
    """What --set may say: settings of the task, of training, and of every mixer that takes options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: dict[str, Any] = {}
    train: Budget = Budget()
    options: dict[str, Any] = {}


def train_mixer(
    name: str,
    task: str = "mqar",
    *,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    budget: Budget | None = None,
    report: Reporter | None = None,
) -> list[Row]:
    """Rows (accuracy, and accuracy beyond every layer's window) of a `Budget.layers`-layer model with mixer `name` (or 'softmax') on `task`.

    settings: of the task (evals/synthetic.py). options: of the mixer. Test sequences come from another seed than training ones. Each row
    carries chance, stderr, n, and state_bytes of the converted layers per sequence. UserError for unknown names and impossible settings.
    """
    budget, report = budget or Budget(), report or Reporter()
    check_name("mixer", name, [SOFTMAX, *MIXERS])
    draw = token_task(task, settings or {})
    length = draw(torch.Generator().manual_seed(0), 1).ids.shape[1]
    model, state_bytes = build(name, options, budget, length)
    started = time.monotonic()
    steps = _train(model, rungs(task, settings or {}), budget, report, name)
    report.line(f"{name}: {steps} steps, {time.monotonic() - started:.0f} s")
    right, distance, chance = _test(model, draw, budget)
    far = distance > budget.layers * (budget.window - 1)
    setting = f"{task}, {length} tokens, {budget.layers} layers of {budget.hidden}, {len(right)} answers, seed {budget.seed}"
    more = {"chance": chance, "state_bytes": state_bytes, "steps": steps}
    parts = {setting: right.tolist(), f"{setting}, beyond {budget.layers} windows of {budget.window}": right[far].tolist()}
    return [row(name, "accuracy", what, mean(part), n=len(part), stderr=stderr(part), **more) for what, part in parts.items() if part]


def train_mixers(names: list[str], task: str, sets: list[str], report: Reporter) -> list[Row]:
    """Rows of several mixers, the first the reference. sets: task.KEY, train.KEY (Budget) and options.KEY (of every mixer but softmax)."""
    asked, problems = Asked(), [] if names else ["Give at least one mixer."]
    try:
        asked = validate(Asked, apply_sets({}, sets))
    except UserError as error:
        problems += error.problems
    options = {name: asked.options if name not in (SOFTMAX, "window") else {} for name in names}
    for name in names:
        try:
            check_name("mixer", name, [SOFTMAX, *MIXERS])
            pieces(name, options[name]) if name != SOFTMAX else None
        except UserError as error:
            problems += error.problems
    raise_all(problems)
    rows = []
    for name in names:
        rows += train_mixer(name, task, settings=asked.task, options=options[name], budget=asked.train, report=report)
    return arrange(rows, names)


def build(name: str, options: dict[str, Any] | None, budget: Budget, length: int) -> tuple[PreTrainedModel, int]:
    """(a fresh model, bytes its converted layers keep of `length` tokens of one sequence; for softmax, its keys and values)."""
    if budget.hidden % (2 * budget.heads):
        raise UserError(f"hidden {budget.hidden} cannot be split into {budget.heads} heads of an even size, which rotary positions need.")
    torch.manual_seed(budget.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=budget.hidden, intermediate_size=2 * budget.hidden, num_hidden_layers=budget.layers,
        num_attention_heads=budget.heads, num_key_value_heads=budget.heads, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_bias=True,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, initializer_range=budget.hidden**-0.5 / 2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if name == SOFTMAX:
        return model, 2 * 4 * length * budget.hidden * budget.layers
    what = plan(model, mixer=name, window=budget.window, sinks=budget.sinks, options=options or {})
    return linearize(model, what), what.student_bytes(length)


def rungs(task: str, settings: dict[str, Any]) -> list[tuple[Any, float]]:
    """(draw, share of the steps) from the easiest form of a task to the one asked for."""
    defaults = {key: value.default for key, value in inspect.signature(lookup("token task", task, TOKEN_TASKS)).parameters.items()}
    full = {key: settings.get(key, defaults[key]) for key in LADDER[task]}
    if not full:
        return [(token_task(task, settings), 1.0)]
    found = []
    for by, share in RUNGS:
        smaller = {key: max(2, value // by) for key, value in full.items()} | ({} if by <= BLANKS_FROM else {"gap": 0})
        found.append((token_task(task, {**settings, **smaller}), share))
    return found


def _train(model: PreTrainedModel, ladder: list, budget: Budget, report: Reporter, name: str) -> int:
    """Steps that were needed."""
    generator = torch.Generator().manual_seed(1_000_003 * (budget.seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr(step, budget.steps))
    model.train()
    rung, recent, until = 0, 0.0, ladder[0][1] * budget.steps
    for step in range(1, budget.steps + 1):
        batch = ladder[rung][0](generator, budget.batch)
        logits = model(input_ids=batch.ids, use_cache=False).logits
        asked = batch.labels != NO_LABEL
        loss = F.cross_entropy(logits[asked].float(), batch.labels[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = 0.9 * recent + 0.1 * (logits[asked].argmax(-1) == batch.labels[asked]).float().mean().item()
        if step % 200 == 0:
            report.line(f"{name}: step {step}/{budget.steps}, rung {rung + 1}, loss {loss.item():.3f}, accuracy {recent:.3f}")
        last = rung == len(ladder) - 1
        if last and recent >= budget.enough:
            return step
        if not last and (recent >= SOLVED or step >= until):
            rung, recent = rung + 1, 0.0
            until = step + ladder[rung][1] * budget.steps
    return budget.steps


def _lr(step: int, steps: int) -> float:
    """Share of the peak: linear warm-up over a tenth of the steps, then a cosine to 0.1."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.inference_mode()
def _test(model: PreTrainedModel, draw, budget: Budget) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(right [N] 0 or 1, distance [N], chance) over every question of the test batches."""
    generator = torch.Generator().manual_seed(7_777_777 + budget.seed)
    model.eval()
    right, distance = [], []
    for _ in range(budget.test_batches):
        batch: Batch = draw(generator, budget.batch)
        asked = batch.labels != NO_LABEL
        guess = model(input_ids=batch.ids, use_cache=False).logits[asked].argmax(-1)
        right.append((guess == batch.labels[asked]).double())
        distance.append(batch.distance[asked])
    return torch.cat(right), torch.cat(distance), batch.chance
