"""Converted models for tests, with mixers that bite, and ways to feed them.

Key: B batch, T tokens.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import subquad
from subquad.linearize.params import mixer_parameters

# Presets that between them use every way in which a mixer meets the seam, the state and the folder: window only, joint and gated, decays and
# delta, gates kept with the window, un-rotated keys, several parts of memory, tied maps, values changed before they are kept.
PRESETS = ("window", "window_linear", "gla", "gated_delta", "nha", "flowformer", "performer", "kernelized", "gateloop", "rodimus_plus")


def randomise(model: PreTrainedModel, std: float = 0.3) -> PreTrainedModel:
    """Random mixer parameters: as built, gates are nearly closed and a wrong linear branch would hardly show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def student_of(teacher: PreTrainedModel, plan: subquad.Plan | None = None, **arguments: Any) -> PreTrainedModel:
    """A converted copy of `teacher` with random mixers; arguments as for subquad.plan."""
    return randomise(subquad.linearize(copy.deepcopy(teacher), plan or subquad.plan(teacher, **arguments)))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B, T] ids below every tiny model's vocabulary and above its special tokens."""
    return torch.randint(5, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def full(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one pass without a cache."""
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def chunked(model: PreTrainedModel, ids: Tensor, cuts: Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Cache]:
    """(logits, cache) of passes over ids[:, 0:cuts[0]], [cuts[0]:cuts[1]], ... with the cache the model makes itself; cuts end at T."""
    cache, outs, start = None, [], 0
    for end in cuts:
        more = {} if mask is None else padded_inputs(model, mask, start, end)
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **more)
        outs.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(outs, 1), cache


def padded_inputs(model: PreTrainedModel, mask: Tensor, start: int, end: int) -> dict[str, Tensor]:
    """What generate would pass beside the tokens start:end of a left-padded batch."""
    more = {"attention_mask": mask[:, :end]}
    if takes_positions(model):
        more["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
    return more


def left_padded(ids: Tensor, lengths: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """(ids [B, width], mask [B, width]): the first lengths[i] tokens of row i, pushed to the right."""
    out, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, n in enumerate(lengths):
        out[i, width - n :], mask[i, width - n :] = ids[i, :n], 1
    return out, mask
