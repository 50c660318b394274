"""Packed sequences for forms that know single ones: cut at cu_seqlens, run one after the other, join."""

from collections.abc import Callable

import torch
from torch import Tensor


def sequences(fn: Callable, tensors: list[Tensor | None], initial_state: Tensor | None, cu_seqlens: Tensor | None):
    """fn(tensors, initial_state) -> (outputs tuple [B, T, ...], final state or None), over each sequence. tensors: [1, T, ...] or None."""
    if cu_seqlens is None:
        return fn(tensors, initial_state)
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = None if initial_state is None else initial_state[n : n + 1]
        if hi > lo:
            out, state = fn([None if x is None else x[:, lo:hi] for x in tensors], state)
            outs.append(out)
        states.append(state)
    joined = tuple(torch.cat(parts, 1) for parts in zip(*outs, strict=True))
    some = next((x for x in states if x is not None), None)
    # An empty sequence leaves the state it was given, or zeros.
    return joined, None if some is None else torch.cat([torch.zeros_like(some) if x is None else x for x in states])
