"""From forms that know one sequence, with query heads in groups, to ops: packed rows are cut at cu_seqlens, run one after the other, and joined.

Key: as in ops.py; R = H / G.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def sequences(fn: Callable, tensors: list[Tensor | None], initial_state: Tensor | None, cu_seqlens: Tensor | None):
    """fn(tensors, initial_state) -> (outputs tuple [B, T, ...], final state or None), over each sequence. tensors: [1, T, ...] or None."""
    if cu_seqlens is None:
        return fn(tensors, initial_state)
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        if hi > lo:
            out, state = fn([None if x is None else x[:, lo:hi] for x in tensors], state)
            outs.append(out)
        states.append(state)
    joined = tuple(torch.cat(parts, 1) for parts in zip(*outs, strict=True))
    some = next((x for x in states if x is not None), None)
    # An empty sequence leaves the state it was given, or zeros.
    return joined, None if some is None else torch.cat([torch.zeros_like(some) if x is None else x for x in states])


def linear(form, q, k, v, gates, *, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, out_dtype=None):
    """Ops 1 and 2 by form(q [B, T, G, R, K], k, v, *gates, initial_state) -> (o [B, T, G, R, V], final state)."""
    G = k.shape[2]

    def one(tensors, state):
        q, *rest = tensors
        o, state = form(q.unflatten(2, (G, -1)), *rest, state)
        return (o.flatten(2, 3),), state

    (o,), state = sequences(one, [q, k, v, *gates], initial_state, cu_seqlens)
    return (o if scale == 1.0 else o * scale).to(out_dtype or v.dtype), state if output_final_state else None
