"""Sizes that must agree before pointers reach compiled code. A letter is a size; the same letter is the same size everywhere in a call."""

from torch import Tensor

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


def sequences(q_BTHK: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of the states: sequences of a packed row, or the batch."""
    return q_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def decay(log_decay: Tensor | None, letters: str) -> tuple[Tensor | None, str]:
    """A scalar decay has no last letter."""
    return log_decay, letters if log_decay is not None and log_decay.dim() == len(letters) else letters[:-1]
