"""What must hold before pointers reach compiled code: sizes that agree, and tensors that are numbers in memory and nothing else.

A letter is a size; the same letter is the same size everywhere in a call.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from subquad.errors import raise_all


def agree(op: str, given: dict[str, tuple[Tensor | None, str]], **known: int) -> None:
    """Raise UserError that names every tensor of `given` {name: (tensor or None, letters)} whose shape does not fit the letters.

    known: letters whose size is settled already. H, where G is there too, must be a multiple of G.
    """
    sizes, problems = dict(known), []
    for name, (x, letters) in given.items():
        if x is None:
            continue
        if x.dim() != len(letters) or any(sizes.setdefault(letter, n) != n for letter, n in zip(letters, x.shape, strict=True)):
            wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
            problems.append(f"{op}: {name} has shape {list(x.shape)}, expected [{wanted}].")
    if not problems and "H" in sizes and "G" in sizes and sizes["H"] % sizes["G"]:
        problems.append(f"{op}: {sizes['H']} query heads are no multiple of {sizes['G']} key/value heads.")
    raise_all(problems)


def more_than_numbers(given: Iterable[Any]) -> str | None:
    """What some tensor of `given` has or is besides numbers in memory, which compiled code would neither see nor give back; None: nothing."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    for x in given:
        if not isinstance(x, Tensor):
            continue
        if type(x) not in (Tensor, Parameter):
            return f"a {type(x).__name__}"  # a trace's FakeTensor has no memory, other subclasses have rules of their own
        if x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            return "a tangent of forward-mode differentiation"
    return None


def sequences(q_BTHK: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of the states: sequences of a packed row, or the batch."""
    return q_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def decay(log_decay: Tensor | None, letters: str) -> tuple[Tensor | None, str]:
    """A scalar decay has no last letter."""
    return log_decay, letters if log_decay is not None and log_decay.dim() == len(letters) else letters[:-1]
