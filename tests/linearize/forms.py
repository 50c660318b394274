"""Every form of every preset against its definition: outputs, gradients and the state that is left. Some rows by test_forms.py, all by benchmarks/mixers_grid.py.

Two sequences, of T tokens and of two fifths of them, each put through the definition alone and in fp64; every form is held to that. In the forms without padding
the second goes on to T tokens, which nothing that came before them may see.

    one call        blocks and chunks, as in training                    steps        one token at a time, as in decoding
    chunks          prefill in calls of uneven sizes
    left-padded     one call, with a third row of nothing but padding    packed       both sequences one after the other in one row
    left-padded, in calls   prefill and three steps of the same batch

Encoders have no state: one call (of each sequence alone), left-padded and packed. Key: as in test_mixers.py; K = V.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from linearize.test_mixers import (
    BOTH_WAYS,
    TENSORS,
    call_of,
    gradients,
    mixer_of,
    part,
    run,
    state_errors,
    through_layout,
)  # fmt: skip
from tolerances import MIXER, MIXER_GRADIENT, OWN_GRADIENT, error, gradient_errors
from torch import Tensor

from subquad.linearize.layout import packed, padded
from subquad.linearize.mixers import causal
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.definition import definition
from subquad.linearize.mixers.definition_whole import whole_definition
from subquad.linearize.state import MixerState

LENGTHS, GROUPS, SIZES = (1, 63, 64, 65, 500), (1, 3, 8), (64, 80, 128)
# Up to here states that are carried from call to call get gradients: training carries none, and saving one a token would not fit into memory.
LONG = 65
# Steps know nothing of the borders of blocks: of 63, 64 and 65 only the last has its gradients taken through steps.
AT_BORDERS = (63, 64)
# The weight of a pair has a corner where its score is 0: no gradient there, and close to it rounding decides which side fp32 takes.
CORNERS = ("relu", "softpick")
ALLOWED = {"forward": MIXER, "gradient": MIXER_GRADIENT, "own": OWN_GRADIENT, "state": MIXER}
Out = tuple[Tensor, MixerState | None]


@dataclass(frozen=True)
class Row:
    case: str
    T: int
    R: int
    K: int

    def __str__(self) -> str:
        return f"{self.case}, T {self.T}, R {self.R}, K {self.K}"

    @property
    def heads(self) -> int:
        return 2 if self.R == 1 else 1

    @property
    def causal(self) -> bool:
        return self.case not in BOTH_WAYS

    @property
    def counts(self) -> tuple[int, int]:
        return self.T, max(2 * self.T // 5, 1)

    def mixer(self, **more):
        return mixer_of(self.case, self.R, size=self.K, heads=self.heads, **more)

    def call(self, batch: int = 2) -> AttentionCall:
        call = call_of(self.T, self.R, batch, self.K, self.heads, causal=self.causal)
        return off_corners(call) if self.case.split(",")[0] in CORNERS else call


def off_corners(call: AttentionCall, least: float = 1e-5) -> AttentionCall:
    """The call with queries that have a score nearer to 0 than `least` drawn again until there are none: 1 in 250 that see 500 keys."""
    q, generator = call.q_BTGRK.clone(), torch.Generator().manual_seed(0)
    while (near := _scores(q, call).abs().amin(-1) < least).any():
        q[near] = torch.randn(int(near.sum()), q.shape[-1], generator=generator)
    return replace(call, q_BTGRK=q)


def _scores(q: Tensor, call: AttentionCall) -> Tensor:
    """[B, T, G, R, J] in fp64."""
    return torch.einsum("btgrk,bjgk->btgrj", q.double(), call.k_BTGK.double()) * call.scale


def cases() -> list[str]:
    """Every preset in each of its directions; `lola` with a cache that these texts fill (test_mixers.CASES)."""
    return [*causal(), *BOTH_WAYS]


def dealt(turn: int, lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """A third of all: every case and length with every size and with every group once. A third of that has every case and length."""
    rows = itertools.product(*map(enumerate, (range(3), lengths, cases())))
    return [Row(case, T, GROUPS[(part + c + t) % 3], SIZES[(2 * (c + t) + part + turn) % 3]) for (_, part), (t, T), (c, case) in rows]


def grid() -> list[Row]:
    return [row for turn in range(3) for row in dealt(turn)]


# --- forms: (mixer, call of two sequences, tokens of each) -> (output in the places of the call, state) -----------------------------------------


def each_alone(fn: Callable[[AttentionCall], Tensor], call: AttentionCall, counts: tuple[int, ...]) -> Tensor:
    outs = [fn(part(call, slice(row, row + 1), slice(n))) for row, n in enumerate(counts)]
    return torch.cat([F.pad(out, (0, 0) * 3 + (0, counts[0] - n)) for out, n in zip(outs, counts, strict=True)])


def by_definition(mixer, call: AttentionCall, counts) -> Out:
    oracle = definition if call.causal else whole_definition
    return each_alone(lambda one: oracle(mixer, one), call, counts), None


def one_call(mixer, call: AttentionCall, counts) -> Out:
    return (mixer(call) if call.causal else each_alone(mixer, call, counts)), None


def chunks(mixer, call: AttentionCall, counts) -> Out:
    T = counts[0]
    return run(mixer, call, sorted({min(n, T) for n in (3, T // 3, T // 3 + 1, 3 * T // 4, T) if n}))


def steps(mixer, call: AttentionCall, counts) -> Out:
    return run(mixer, call, list(range(1, counts[0] + 1)))


def moved(call: AttentionCall, place: Callable[[Tensor], Tensor]) -> AttentionCall:
    cut = {name: place(getattr(call, name)) for name in TENSORS}
    return replace(call, **cut, fewest=cut["q_BTGRK"].shape[1])


def pushed(call: AttentionCall, counts) -> tuple[AttentionCall, Tensor]:
    """(three rows: all of the first sequence; the first tokens of the second after what follows them; only filler, mask)."""
    T, n = counts
    mask = torch.zeros(3, T, dtype=torch.long)
    mask[0], mask[1, T - n :] = 1, 1
    return moved(call, lambda x: torch.stack([x[0], torch.cat([x[1, n:], x[1, :n]]), x[1]])), mask


def back(out: Tensor, counts) -> Tensor:
    T, n = counts
    return torch.stack([out[0], torch.cat([out[1, T - n :], out[1, : T - n]])])


def left_padded(mixer, call: AttentionCall, counts) -> Out:
    call, mask = pushed(call, counts)
    return back(through_layout(mixer, call, padded(mask)), counts), None


def left_padded_in_calls(mixer, call: AttentionCall, counts) -> Out:
    call, mask = pushed(call, counts)
    T = counts[0]
    out, state = run(mixer, call, sorted({n for n in (T // 2, T - 3, T - 2, T - 1, T) if n > 0}), mask)
    return back(out, counts), state


def in_one_row(mixer, call: AttentionCall, counts, state: MixerState | None = None) -> Out:
    """The second sequence, then the first."""
    T, n = counts
    positions = torch.cat([torch.arange(n), torch.arange(T)])[None]
    out = through_layout(mixer, moved(call, lambda x: torch.cat([x[1, :n], x[0]])[None]), packed(positions, 1), state)[0]
    return torch.stack([out[n:], F.pad(out[:n], (0, 0) * 3 + (0, T - n))]), state


def in_one_row_with_state(mixer, call: AttentionCall, counts) -> Out:
    return in_one_row(mixer, call, counts, MixerState())


# Name -> (form, the sequence and its tokens in each row of its state: "all" T of them, or its own number).
FORMS = {
    "one call": (one_call, ()),
    "chunks": (chunks, ((0, "all"), (1, "all"))),
    "steps": (steps, ((0, "all"), (1, "all"))),
    "left-padded": (left_padded, ()),
    "left-padded, in calls": (left_padded_in_calls, ((0, "all"), (1, "own"))),
    "packed": (in_one_row, ()),
    "packed, with state": (in_one_row_with_state, ((1, "own"), (0, "all"))),
}
WITHOUT_STATE = ("one call", "left-padded", "packed")


@dataclass
class Subject:
    """A row's mixer and texts, what its definition makes of them, and the states of the texts alone."""

    mixer: torch.nn.Module
    call: AttentionCall
    counts: tuple[int, int]
    weight: Tensor
    out: Tensor
    slopes: dict[str, Tensor]
    states: dict[tuple[int, int], MixerState]


@contextmanager
def in_fp64():
    """Mixers ask for fp32 by `.float()` and the default dtype; here they get fp64: the definition's own rounding is no part of an error."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def subject(row: Row) -> Subject:
    mixer, call, counts = row.mixer(), row.call(), row.counts
    on = torch.arange(row.T) < torch.tensor(counts)[:, None]
    weight = torch.randn(call.q_BTGRK.shape, generator=torch.Generator().manual_seed(row.T)) * on[..., None, None, None]
    exact = copy.deepcopy(mixer).double()
    with in_fp64():
        out, slopes = gradients(exact, moved(call, Tensor.double), lambda c: by_definition(exact, c, counts)[0], weight.double())
    states = {}
    with torch.no_grad():
        for b, n in {(0, row.T), (1, row.T), (1, counts[1])} if row.causal else ():
            states[b, n] = run(mixer, part(call, slice(b, b + 1), slice(n)), [n])[1]
    return Subject(mixer, call, counts, weight, out, slopes, states)


def errors(row: Row) -> dict[str, dict[str, float]]:
    """Form -> {what: how far off}; what is `forward`, `gradient NAME`, `state NAME` or `own NAME`: a gradient by its own largest number alone."""
    one, found = subject(row), {}
    for name in FORMS if row.causal else WITHOUT_STATE:
        found[name] = {}
        for what, off in form_errors(one, *FORMS[name]):
            found[name][what] = max(off, found[name].get(what, 0.0))
    return found


def form_errors(one: Subject, form: Callable[..., Out], rows: tuple) -> Iterator[tuple[str, float]]:
    found = []
    T = one.counts[0]
    carried = T <= LONG and not (form is steps and T in AT_BORDERS)
    if carried or not rows:
        out, slopes = gradients(one.mixer, one.call, kept_in(found, one, form), one.weight)
        for what, least in (("gradient", 1e-2), ("own", 0.0)):
            yield from ((f"{what} {name}", off) for name, off in gradient_errors(slopes, one.slopes, least))
    if rows:  # steps without gradients are other code
        with torch.no_grad():
            kept_in(found, one, form)(one.call)
    for out, state in found:
        yield "forward", error(torch.where(one.weight != 0, out, 0.0), one.out)
        for place, (b, tokens) in enumerate(rows):
            n = one.counts[0] if tokens == "all" else one.counts[b]
            for name, off in state_errors(one.mixer, state, place, one.states[b, n], n).items():
                yield f"state {name}", off


def kept_in(found: list[Out], one: Subject, form: Callable[..., Out]) -> Callable[[AttentionCall], Tensor]:
    def call_form(call: AttentionCall) -> Tensor:
        found.append(form(one.mixer, call, one.counts))
        return found[-1][0]

    return call_form


# --- other promises -----------------------------------------------------------------------------------------------------------------------


def never_infinite(row: Row, times: float) -> bool:
    """Outputs and gradients of logits `times` as large: in one call, left-padded with a row of nothing but padding, in calls, and nothing but padding."""
    mixer, call, counts = row.mixer(), row.call(), row.counts
    call = replace(call, q_BTGRK=call.q_BTGRK * times)
    finite = []
    for name in FORMS if row.causal else WITHOUT_STATE:
        finite += all_finite(*gradients(mixer, call, lambda c, form=FORMS[name][0]: form(mixer, c, counts)[0], torch.ones(1)))
    nothing = padded(torch.zeros(2, row.T))
    for state in (None, MixerState()) if row.causal else (None,):
        finite += all_finite(*gradients(mixer, call, lambda c, state=state: through_layout(mixer, c, nothing, state), torch.ones(1)))
    return all(finite)


def all_finite(out: Tensor, slopes: dict[str, Tensor]) -> list[bool]:
    return [bool(x.isfinite().all()) for x in (out, *slopes.values())]
