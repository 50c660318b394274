"""lm-evaluation-harness on models in memory (extra `eval`): its tasks, prompts and metrics, our batching and caches.

Everything that needs the package is made when it is asked for, so that the rest works without it.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from subquad.errors import UserError
from subquad.evals.answers import Answers
from subquad.evals.models import Models
from subquad.evals.paired import difference, recovery
from subquad.evals.requests import BATCH_TOKENS, Request, encode_pair, generate, prefix_token, rolling_requests, score
from subquad.evals.rows import Row, row

NEEDED = "lm-evaluation-harness is not installed: pip install -c constraints.txt 'subquad[eval]'. Local files need it not: --tasks FILE."
LONGEST = 2048  # tokens of a window where a model does not say how many positions it has


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def harness_model(
    name: str, opener, tokenizer: Any, answers: Answers | None = None, longest: int | None = None, batch_tokens: int = BATCH_TOKENS
):
    """An lm_eval LM around an opener (models.py): pass it to lm_eval.simple_evaluate(model=...). longest: tokens of a window.
    batch_tokens: of a padded batch; 1 asks one sequence at a time.

    Splits text into tokens as lm_eval's own `hf` model does with its defaults, so that the same model gives the same numbers.
    """
    if not installed():
        raise UserError(NEEDED)
    from lm_eval.api.model import TemplateLM

    answers = Answers() if answers is None else answers
    with opener() as model:
        longest = longest or getattr(model.config, "max_position_embeddings", None) or LONGEST

    class InMemory(TemplateLM):
        backend = "causal"
        max_length = longest

        def __init__(self):
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return prefix_token(tokenizer)

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
            )

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
            return (
                tokenizer.encode(string) if add_special_tokens is None else tokenizer.encode(string, add_special_tokens=add_special_tokens)
            )

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [encode_pair(tokenizer, *request.args) for request in requests]
            return self._loglikelihood_tokens([(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)])

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            asked = []
            for _, before, after in requests:
                ids = tuple([*before, *after][-(longest + 1) :])
                asked.append(Request(ids, ((max(1, len(ids) - len(after)), len(ids)),)))
            return [(spans[0].logprob, spans[0].greedy) for spans in score(name, opener, asked, answers, batch_tokens)]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows = [rolling_requests(self.tok_encode(request.args[0]), self.prefix_token_id, longest) for request in requests]
            found = iter(score(name, opener, [window for part in windows for window in part], answers, batch_tokens))
            return [sum(next(found)[0].logprob for _ in part) for part in windows]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = [""] * len(requests)
            groups: dict[tuple, list[int]] = {}
            for index, request in enumerate(requests):
                more = dict(request.args[1])
                until = more.get("until") or []
                if more.get("do_sample") or more.get("temperature"):
                    raise UserError("This task samples; only greedy generation is measured here. Run lm_eval on the saved folder for it.")
                stops = (until,) if isinstance(until, str) else tuple(until)
                groups.setdefault((stops, int(more.get("max_gen_toks", 256))), []).append(index)
            for (stops, count), members in groups.items():
                room = max(1, longest - count)
                prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in members]
                for index, text in zip(members, generate(name, opener, tokenizer, prompts, count, stops, answers), strict=True):
                    texts[index] = text
            return texts

    return InMemory()


def run_harness(
    models: Models, tokenizer: Any, tasks: Sequence[Any], answers: Answers, limit: int | None = None, **settings: Any
) -> dict[str, Any]:
    """model name -> what lm_eval.simple_evaluate returns for `tasks` (names, or task objects of lm_eval). settings go to simple_evaluate."""
    if not installed():
        raise UserError(NEEDED)
    from lm_eval import simple_evaluate

    found = {}
    for name, opener in models.items():
        model = harness_model(name, opener, tokenizer, answers)
        found[name] = simple_evaluate(model=model, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=True, **settings)
    return found


def lm_eval(
    models: Models,
    tokens: Tensor,
    *,
    tokenizer: Any,
    answers: Answers,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
) -> list[Row]:
    """Every metric lm-evaluation-harness reports for `tasks`, over the first `limit` items of each (None: all). Data sets come from the hub, or
    from where the task's own configuration says; UserError when they cannot be reached."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError("lm_eval.tasks: give at least one task of lm-evaluation-harness.")
    if limit == 0:
        raise UserError("lm_eval.limit: 0 leaves no items to measure.")
    if not installed():
        raise UserError(NEEDED)
    check_names(names)
    if not models:
        return []
    try:
        found = run_harness(models, tokenizer, names, answers, limit, num_fewshot=shots)
    except (ConnectionError, FileNotFoundError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"lm_eval: the data of {', '.join(names)} cannot be had: {first} Without a network, give local files instead."
        ) from error
    return _rows(found)


def check_names(names: Sequence[str]) -> None:
    """UserError with the nearest names for tasks lm-evaluation-harness does not have."""
    from lm_eval.tasks import TaskManager

    from subquad.registry import nearest

    known = TaskManager().all_tasks
    problems = [f"lm_eval.tasks: no task {name!r}.{nearest(name, known)}" for name in names if name not in known]
    if problems:
        raise UserError(*problems)


def _rows(found: Mapping[str, Any]) -> list[Row]:
    rows, (reference, *_) = [], list(found)
    for name, result in found.items():
        for task, values in result["results"].items():
            items = len(result["samples"].get(task, ())) or None
            for label, value in values.items():
                metric = label.partition(",")[0]
                if not isinstance(value, float | int) or isinstance(value, bool) or metric.endswith("_stderr") or metric == "alias":
                    continue
                more = _paired(found, reference, name, task, metric)
                error = values.get(label.replace(metric, f"{metric}_stderr", 1))
                error = error if isinstance(error, float) else more.pop("stderr", None)
                more.pop("stderr", None)
                rows.append(
                    row(name, "lm_eval", f"{task} {label}, {items} items", float(value), task=task, n=items or 0, stderr=error, **more)
                )
    return rows


def _paired(found: Mapping[str, Any], reference: str, name: str, task: str, metric: str) -> dict[str, Any]:
    """Standard error and paired difference, where the harness kept the metric of every item."""
    from subquad.evals.paired import mean, stderr

    def values(model: str) -> list[float] | None:
        samples = sorted(found[model]["samples"].get(task, ()), key=lambda sample: sample["doc_id"])
        scores = [sample.get(metric) for sample in samples]
        return scores if scores and all(isinstance(score, int | float) for score in scores) else None

    own, base = values(name), values(reference)
    if own is None or base is None or len(own) != len(base):
        return {}
    more: dict[str, Any] = {"stderr": stderr(own)}
    if name != reference:
        more["difference"], more["difference_stderr"] = difference(own, base)
        more["recovery"] = recovery(mean(own), mean(base))
    return more
