"""Logits of one sequence, a few positions at a time.

At a vocabulary of 49,152 the fp32 logits of 32k tokens are 6.4 GB. Where the model is "base model, then a linear head" the last hidden
states are kept instead (75 MB at a hidden size of 576) and the head runs on CHUNK positions at a time.

Key: T tokens of the sequence, C positions of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.errors import UserError

CHUNK = 256  # positions: 50 MB of fp32 logits at V = 49,152
PROBE = 4  # tokens that tell a plain linear head from one with scaling, softcap or more


class Logits:
    """Logits of every position of one sequence. ids: [T], on any device. Call it under inference_mode with the model in eval mode."""

    def __init__(self, model: PreTrainedModel, ids_T: Tensor):
        ids_1T = ids_T[None].to(model.device)
        self.head = plain_head(model, ids_1T[:, :PROBE])
        output = _forward(model if self.head is None else model.base_model, model, ids_1T)
        self.rows = output.logits[0] if self.head is None else output.last_hidden_state[0]  # [T, V] or [T, D]

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(positions, fp32 logits [C, V]) that cover positions start to stop."""
        stop = len(self.rows) if stop is None else stop
        for first in range(start, stop, CHUNK):
            part = slice(first, min(first + CHUNK, stop))
            yield part, self[part]

    def __getitem__(self, part: slice) -> Tensor:
        rows = self.rows[part]
        return (rows if self.head is None else self.head(rows)).float()


def token_nll(model: PreTrainedModel, ids_T: Tensor, first: int = 1) -> Tensor:
    """Negative log-likelihood in nats of ids[first:], each given all tokens before it: fp64 [T - first] on CPU."""
    assert 1 <= first < len(ids_T), "the first token has nothing before it"
    logits = Logits(model, ids_T)
    labels_T = ids_T.to(logits.rows.device)
    parts = [F.cross_entropy(chunk, labels_T[1:][part], reduction="none") for part, chunk in logits.chunks(first - 1, len(ids_T) - 1)]
    return torch.cat(parts).double().cpu()


def plain_head(model: PreTrainedModel, ids_1T: Tensor | None = None) -> nn.Linear | None:
    """The output layer if logits are exactly `head(last hidden state)` on a few tokens (the vocabulary's first if none are given), else None.

    Nothing says so in a config: softcaps, logit scales and the like live in each family's forward. The same product of the same shapes
    gives the same numbers, hence the tight tolerance; a head that is missed costs memory only.
    """
    head, base = model.get_output_embeddings(), model.base_model
    ids_1T = torch.arange(PROBE, device=model.device)[None] if ids_1T is None else ids_1T
    if base is model or type(head) is not nn.Linear:
        return None
    hidden = getattr(_forward(base, model, ids_1T), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return None
    logits = _forward(model, model, ids_1T).logits
    split = head(hidden)
    same = split.shape == logits.shape and torch.allclose(split.float(), logits.float(), rtol=1e-6, atol=1e-6)
    return head if same else None


def _forward(module: nn.Module, model: PreTrainedModel, ids_1T: Tensor):
    """One pass without a cache. Ids or positions that the model's tables do not hold become a sentence."""
    try:
        return module(input_ids=ids_1T, use_cache=False)
    except IndexError as error:
        vocabulary, longest = model.get_input_embeddings().num_embeddings, getattr(model.config, "max_position_embeddings", None)
        highest, length = int(ids_1T.max()), ids_1T.shape[1]
        if highest >= vocabulary:
            reason = "the text was made with another tokenizer"
            raise UserError(f"Token id {highest} is outside the model's vocabulary of {vocabulary}: {reason}.") from error
        if longest is not None and length > longest:
            advice = "lower the eval's context or length"
            raise UserError(f"{type(model).__name__} has {longest} positions, {length} tokens are too many: {advice}.") from error
        raise
