"""Questions to a model: how likely are these tokens after those, and how does it go on. Batched, the same batches however often a run is stopped.

Key: B batch, T tokens, D hidden size, N positions that are asked about, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.evals.answers import Answers, key
from subquad.evals.logits import CHUNK, plain_head
from subquad.evals.models import Models, measuring

BATCH_TOKENS = 2048  # of one forward call, padding included: more does not run faster on a CPU
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Request:
    """ids: the whole sequence. spans: [start, stop) places in it to score, start >= 1, each given everything before it."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scored:
    """logprob: nats, summed over the span. greedy: every token of the span was the most likely one."""

    logprob: float
    greedy: bool


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, split as lm-evaluation-harness splits them: spaces at the end of the context go to the continuation, the whole is
    encoded, and what goes beyond the encoded context is the continuation. An empty context becomes the prefix token."""
    if not context:
        return [prefix_token(tokenizer)], tokenizer.encode(continuation, add_special_tokens=False)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    return whole[:start], whole[start:]


def prefix_token(tokenizer: Any) -> int:
    """What stands before a text that has nothing before it: bos, else eos."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def pair_request(tokenizer: Any, context: str, continuation: str) -> Request:
    before, after = encode_pair(tokenizer, context, continuation)
    return Request((*before, *after), ((len(before), len(before) + len(after)),))


def rolling_requests(ids: Sequence[int], prefix: int, longest: int) -> list[Request]:
    """Windows that score every token of a document once: the first starts with `prefix`, each later one predicts `longest` new tokens given
    at least the one before them; the last one reaches back as far as fits."""
    requests, done = [], 0
    while done < len(ids):
        count = min(longest, len(ids) - done)
        stop = done + count
        window = (prefix, *ids[:stop]) if done == 0 else tuple(ids[max(0, stop - longest - 1) : stop])
        requests.append(Request(window, ((len(window) - count, len(window)),)))
        done = stop
    return requests


def score_all(
    models: Models, requests: Sequence[Request], answers: Answers, batch_tokens: int = BATCH_TOKENS
) -> dict[str, list[list[Scored]]]:
    """model name -> for every request, what each of its spans scored. Equal requests are asked once; known answers are not asked again."""
    return {name: score(name, opener, requests, answers, batch_tokens) for name, opener in models.items()}


def score(name: str, opener, requests: Sequence[Request], answers: Answers, batch_tokens: int = BATCH_TOKENS) -> list[list[Scored]]:
    """As score_all, for one model."""
    unique = list(dict.fromkeys(requests))
    with measuring(opener) as model:
        mark = answers.mark(model)
        keys = {request: key(name, mark, "score", request.ids, request.spans) for request in unique}
        head = None
        for batch in _progress(batches(unique, batch_tokens), f"{name}: sequences scored", len(unique), answers):
            # A batch is asked again as a whole, so that its numbers do not depend on where a run was stopped.
            if all(answers.get(keys[request]) is not None for request in batch):
                continue
            head = _Head(model) if head is None else head
            found = _score_batch(model, head, batch)
            answers.put({keys[request]: value for request, value in zip(batch, found, strict=True)})
    return [[Scored(logprob, greedy) for logprob, greedy in answers.get(keys[request])] for request in requests]


def batches(requests: Sequence[Request], batch_tokens: int) -> Iterator[list[Request]]:
    """Longest first, as many of a length as fit."""
    ordered = sorted(requests, key=lambda request: (-len(request.ids), request.ids, request.spans))
    at = 0
    while at < len(ordered):
        count = max(1, batch_tokens // len(ordered[at].ids))
        yield ordered[at : at + count]
        at += count


class _Head:
    """Logits at chosen positions: hidden states first, then the output layer on those positions only, where the model allows it."""

    def __init__(self, model: PreTrainedModel):
        self.head = plain_head(model)

    def rows(self, model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T, D] hidden states, or [B, T, V] logits of a model whose output layer is more than linear."""
        mask = None if bool(mask_BT.all()) else mask_BT
        if self.head is None:
            return model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits
        return model.base_model(input_ids=ids_BT, attention_mask=mask, use_cache=False).last_hidden_state

    def logits(self, rows_ND: Tensor) -> Tensor:
        return (rows_ND if self.head is None else self.head(rows_ND)).float()


def _score_batch(model: PreTrainedModel, head: _Head, batch: list[Request]) -> list[list[tuple[float, bool]]]:
    """Padded on the right: causal models do not see it, and the mask keeps it out of recurrent states."""
    width = max(len(request.ids) for request in batch) - 1  # the last token predicts nothing that is asked
    ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for row, request in enumerate(batch):
        ids_BT[row, : len(request.ids) - 1] = torch.tensor(request.ids[:-1])
        mask_BT[row, : len(request.ids) - 1] = 1
    rows_BTD = head.rows(model, ids_BT.to(model.device), mask_BT.to(model.device))
    place = [(row, at) for row, request in enumerate(batch) for start, stop in request.spans for at in range(start, stop)]
    labels_N = torch.tensor([batch[row].ids[at] for row, at in place], device=rows_BTD.device)
    picked_ND = rows_BTD[[row for row, _ in place], [at - 1 for _, at in place]]
    logprob, greedy = [], []
    for part in range(0, len(place), CHUNK):
        logits_CV, labels_C = head.logits(picked_ND[part : part + CHUNK]), labels_N[part : part + CHUNK]
        logprob.append(-F.cross_entropy(logits_CV, labels_C, reduction="none"))
        greedy.append(logits_CV.argmax(-1) == labels_C)
    logprob_N, greedy_N = torch.cat(logprob).double().tolist(), torch.cat(greedy).tolist()
    found, at = [], 0
    for request in batch:
        spans = []
        for start, stop in request.spans:
            spans.append((sum(logprob_N[at : at + stop - start]), all(greedy_N[at : at + stop - start])))
            at += stop - start
        found.append(spans)
    return found


def generate(
    name: str,
    opener,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Sequence[str],
    answers: Answers,
    batch: int = 8,
) -> list[str]:
    """Greedy continuations as text, cut before the first of `stops`."""
    found = write(name, opener, prompts, new_tokens, answers, tokenizer=tokenizer, stops=stops, batch=batch)
    return [cut(tokenizer.decode(ids, skip_special_tokens=True), stops) for ids in found]


def write(
    name: str,
    opener,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    answers: Answers,
    *,
    tokenizer: Any = None,
    stops: Sequence[str] = (),
    whole: bool = False,
    batch: int = 8,
) -> list[list[int]]:
    """Greedy continuations as ids, until the end token, one of `stops` (needs the tokenizer) or `new_tokens`; whole: always `new_tokens`.

    Prompts are batched with padding on the left; each model runs with its own cache (recurrent where it is)."""
    unique = sorted({tuple(prompt) for prompt in prompts}, key=lambda ids: (-len(ids), ids))
    with measuring(opener) as model:
        mark = answers.mark(model)
        keys = {ids: key(name, mark, "write", ids, new_tokens, list(stops), whole) for ids in unique}
        more: dict[str, Any] = {"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}
        more |= {"min_new_tokens": new_tokens} if whole else {}
        groups = [unique[at : at + batch] for at in range(0, len(unique), batch)]
        for group in _progress(groups, f"{name}: texts generated", len(unique), answers):
            if any(answers.get(keys[ids]) is None for ids in group):
                found = _write_batch(model, group, max_new_tokens=new_tokens, **more)
                answers.put({keys[ids]: new for ids, new in zip(group, found, strict=True)})
    return [answers.get(keys[tuple(prompt)]) for prompt in prompts]


def _write_batch(model: PreTrainedModel, prompts: list[tuple[int, ...]], **how: Any) -> list[list[int]]:
    """New ids of each prompt, without what fills up rows that ended early."""
    width, ends = max(map(len, prompts)), model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = ends[0] if ends else 0
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    out = model.generate(input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, num_beams=1, pad_token_id=pad, **how)
    return out[:, width:].tolist()


def cut(text: str, stops: Sequence[str]) -> str:
    """Everything before the first stop."""
    places = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _progress(groups, what: str, total: int, answers: Answers):
    """Hand out groups; a line with the time left every half minute."""
    started = spoke = time.monotonic()
    done = 0
    for group in groups:
        yield group
        done += len(group)
        now = time.monotonic()
        if now - spoke > SECONDS_BETWEEN_LINES:
            spoke = now
            answers.log(f"  {what}: {done}/{total}, {(now - started) / done * (total - done):.0f} s left")
