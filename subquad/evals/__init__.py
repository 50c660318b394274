"""Measurements of a student beside its teacher. One task, one function, one row here; `evaluate` runs a choice of them on the same text.

task                    metric (unit)                                        setting says
perplexity              perplexity                                           windows x context (and stride)
by_position             perplexity_by_position                               range of positions, windows x context
repeat                  repeat_perplexity, on the second copy of a passage   length + length, samples, seed
agreement               kl_to_teacher (nats per token), top1_agreement       windows x context
                        (share of tokens)
decode                  decode_tokens_per_second, state_bytes (bytes)        tokens in the cache, timed steps, threads
throughput              as decode, and prefill_tokens_per_second,            tokens, steps, threads
                        first_token_seconds, peak_bytes, crossover_tokens
choice, pairs, mmlu     accuracy, accuracy_norm, option_bias                 file, items of all, shots
gsm8k                   accuracy of written answers                          items of all, shots
rolling                 word_perplexity, bits_per_byte                       file, words, context
generation              repetition, free-running agreement and KL            prompts x tokens
passkey, niah_*, mqar,  accuracy, accuracy_by_depth                          tokens, depth, texts, seed
phonebook, copying, selective_copying, induction, listops, variable_tracking
lm_eval                 whatever lm-evaluation-harness reports               task, metric, items

Every task is `task(models, tokens, *, settings) -> list[Row]`. A parameter with a default is a setting that a recipe may give; a parameter
without one is handed over from Python. With no models a task checks its settings, the length of the text and (with a tokenizer) what it makes of
them, and returns no rows.
"""

import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from subquad.errors import UserError, raise_all
from subquad.evals.rows import METRICS, Row, arrange, shown
from subquad.registry import lookup, unknown_settings

if TYPE_CHECKING:  # torch is slow to import; recipes and the command line want the names only
    from torch import Tensor

    from subquad.evals.models import Models

__all__ = ["TASKS", "Row", "evaluate", "handed", "not_whole", "problems", "task_settings"]

TASKS = {
    "perplexity": "subquad.evals.perplexity:perplexity",
    "by_position": "subquad.evals.perplexity:by_position",
    "repeat": "subquad.evals.repeat:repeat",
    "agreement": "subquad.evals.agreement:agreement",
    "decode": "subquad.evals.speed:decode",
    "throughput": "subquad.evals.speed:throughput",
    "choice": "subquad.evals.choice:choice",
    "pairs": "subquad.evals.choice:pairs",
    "mmlu": "subquad.evals.choice:mmlu",
    "gsm8k": "subquad.evals.generation:gsm8k",
    "generation": "subquad.evals.generation:generation",
    "rolling": "subquad.evals.rolling:rolling",
    "passkey": "subquad.evals.recall.tasks:passkey",
    "niah_single": "subquad.evals.recall.tasks:niah_single",
    "niah_multi_key": "subquad.evals.recall.tasks:niah_multi_key",
    "niah_multi_value": "subquad.evals.recall.tasks:niah_multi_value",
    "mqar": "subquad.evals.recall.tasks:mqar",
    "phonebook": "subquad.evals.recall.tasks:phonebook",
    "copying": "subquad.evals.recall.tasks:copying",
    "selective_copying": "subquad.evals.recall.tasks:selective_copying",
    "induction": "subquad.evals.recall.tasks:induction",
    "listops": "subquad.evals.recall.tasks:listops",
    "variable_tracking": "subquad.evals.recall.tasks:variable_tracking",
    "lm_eval": "subquad.evals.harness:lm_eval",
}


def evaluate(
    models: "Models",
    tokens: "Tensor",
    tasks: Mapping[str, Mapping[str, Any]],
    log: Callable[[str], None] | None = None,
    remember: Callable[[str, Mapping[str, Any], Callable[[], list[Row]]], list[Row]] | None = None,
) -> list[Row]:
    """Rows (model, metric, setting, value, ratio to the first model) in the order of `tasks`; within a setting in the order of `models`.

    models: name -> function that returns a context manager around a model. The first is the reference (teacher); alone it has no ratios.
    The contexts are entered many times, in turn (decode enters one per step), so they must be cheap: nullcontext around a loaded model, or
    a switch of one model between teacher and student. tokens: 1-D ids. tasks: {name: settings}. log: called with a line now and then.
    remember(name, settings, run): returns run()'s rows, or those an earlier call kept.
    Raises UserError with all problems of names, settings and text length before the first model runs.
    """
    log = log or (lambda line: None)
    found = [] if models else ["There is no model to evaluate."]
    if "agreement" in tasks and len(models) == 1:
        found.append("agreement compares models with the first one, and there is one only: give a teacher too, or leave the task out.")
    raise_all([*found, *problems(tokens, tasks)])
    rows: list[Row] = []
    for number, (name, settings) in enumerate(tasks.items(), 1):
        log(f"[{number}/{len(tasks)}] {name}: {', '.join(models)}")
        started = time.monotonic()
        found = arrange((remember or _plainly)(name, settings, partial(_run, name, models, tokens, settings)), list(models))
        rows += found
        for metric, setting in dict.fromkeys((row["metric"], row["setting"]) for row in found if not METRICS[row["metric"]].detail):
            values = (f"{row['model']} {shown(row)}" for row in found if (row["metric"], row["setting"]) == (metric, setting))
            log(f"  {metric} ({setting}): {', '.join(values)}")
        log(f"  {time.monotonic() - started:.0f} s")
    return rows


def _run(name: str, models: "Models", tokens: "Tensor", settings: Mapping[str, Any]) -> list[Row]:
    return lookup("eval task", name, TASKS)(models, tokens, **settings)


def _plainly(name: str, settings: Mapping[str, Any], run: Callable[[], list[Row]]) -> list[Row]:
    return run()


def problems(tokens: "Tensor", tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with names, settings and the length of the text: everything that can be known without a model."""
    found = []
    for name, settings in tasks.items():
        try:
            allowed = [*handed(name), *task_settings(name)]
            missing = [f"{name}.{key}: needed, but not given." for key in handed(name) if key not in settings]
            raise_all(unknown_settings(settings, allowed, f"{name}.") + missing)
            lookup("eval task", name, TASKS)({}, tokens, **settings)
        except UserError as error:
            found += error.problems
    return found


def task_settings(name: str) -> list[str]:
    """What may be set of a task: its parameters with a default."""
    return [key for key, default in _parameters(name).items() if default is not inspect.Parameter.empty]


def not_whole(name: str, settings: Mapping[str, Any]) -> list[str]:
    """A sentence for every setting that is one whole number by its function's signature and is given something else."""
    parameters = inspect.signature(lookup("eval task", name, TASKS)).parameters
    found = []
    for key, value in settings.items():
        hint = parameters[key].annotation if key in parameters else None
        if hint in (int, int | None) and (isinstance(value, bool) or not isinstance(value, hint)):
            found.append(f"{name}.{key}: expected a whole number{'' if hint is int else ' or null'}, got {value!r}.")
    return found


def handed(name: str) -> list[str]:
    """What a task is handed from Python: its parameters without a default."""
    return [key for key, default in _parameters(name).items() if default is inspect.Parameter.empty]


def _parameters(name: str) -> dict[str, Any]:
    """Keyword-only parameters of a task and their defaults."""
    parameters = inspect.signature(lookup("eval task", name, TASKS)).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
