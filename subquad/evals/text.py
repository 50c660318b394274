"""Settings checked and text cut into blocks: always the same blocks for the same tokens, so that every model is asked the same questions.

Key: N tokens of the text, C tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subquad.errors import UserError


@dataclass(frozen=True)
class Block:
    """ids: [C]. Tokens from place `scored` on count; those before it are context (the very first token of a block is never predicted)."""

    ids: Tensor
    scored: int


def blocks(task: str, tokens: Tensor, context: int, windows: int | None, stride: int | None = None) -> list[Block]:
    """The first `windows` blocks of `context` tokens, or all that fit; each starts `stride` tokens (default: context) after the one before.

    With a stride below context, a block counts only the tokens that the one before has not counted. UserError names what is missing.
    """
    context = whole(f"{task}.context", context, least=2)
    stride = context if stride is None else whole(f"{task}.stride", stride, least=1)
    if stride > context:
        raise UserError(f"{task}.stride: {stride} would skip tokens; give at most context, {context}.")
    fitting = max(0, (len(tokens) - context) // stride + 1)
    wanted = max(1, fitting) if windows is None else whole(f"{task}.windows", windows, least=1)
    if wanted > fitting:
        needed = (wanted - 1) * stride + context
        advice = f"Set {task}.windows to at most {fitting}, or lower {task}.context." if fitting else f"Lower {task}.context."
        raise UserError(f"{task} needs {needed} tokens of text ({_count(wanted, context, stride)}); the text has {len(tokens)}. {advice}")
    overlapped = max(1, context - stride)  # places that the block before has counted already
    return [Block(tokens[i * stride : i * stride + context], overlapped if i else 1) for i in range(wanted)]


def describe(cut: list[Block], stride: int | None = None) -> str:
    """'8 x 2048 tokens', as it stands in a row's setting."""
    context = len(cut[0].ids)
    return _count(len(cut), context, context if stride is None else stride)


def _count(windows: int, context: int, stride: int) -> str:
    return f"{windows} x {context} tokens" + (f", stride {stride}" if stride != context else "")


def whole(name: str, value: object, least: int) -> int:
    """A whole number of at least `least`, or a UserError that says so."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}.")
    return value


def wholes(name: str, value: object, least: int) -> list[int]:
    """One whole number or several; repeated ones are taken once."""
    several = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not several:
        raise UserError(f"{name}: expected at least one whole number, got an empty list.")
    return list(dict.fromkeys(whole(name, item, least) for item in several))
