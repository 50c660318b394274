"""The parity suite: every family of families.py through every way of running a student, with mixers that are not what they were at the start.

A family gets one mixer (they rotate over the table); llama gets all of them.
"""

import copy
from functools import cached_property

import pytest
import torch
from helpers import SIZES, tiny_model
from linearize.families import FAMILIES, OWN_LIMITS, REFUSED
from linearize.students import PRESETS, chunked, full, left_padded, padded_inputs, student_of, takes_positions, tokens
from tolerances import FAMILY, assert_near, error
from transformers import AutoConfig

import subquad

# Not gateloop: its phases are sums over the text, and families repeat it at 1e-5 to 4e-5 only; test_mixers.py holds it to its definition.
# Not rodimus_plus: a window as long as the text is the teacher only where nothing is added to the values.
ROTATION = [mixer for mixer in PRESETS if mixer not in ("gateloop", "rodimus_plus")]
CASES = [(name, ROTATION[i % len(ROTATION)]) for i, name in enumerate(FAMILIES)]
CASES += [("llama", mixer) for mixer in ROTATION if ("llama", mixer) not in CASES]
LENGTH, WINDOW, SINKS = 20, 6, 2
LENGTHS = (20, 13, 4)  # of three rows: longer and shorter than the window, and barely longer than the sinks
STEPS = [9, 13, *range(14, LENGTH + 1)]  # two chunks, then token by token


class Case:
    def __init__(self, family: str, mixer: str):
        self.family, self.mixer = family, mixer
        self.model_type, self.limits = family.partition("/")[0], OWN_LIMITS.get(family, {})
        self.teacher = tiny_model(self.model_type, **FAMILIES[family])
        self.ids = tokens(len(LENGTHS), LENGTH)
        self.plan = subquad.plan(self.teacher, mixer=mixer, window=WINDOW, sinks=SINKS)

    @cached_property
    def teacher_logits(self):
        return full(self.teacher, self.ids)

    @cached_property
    def students(self) -> dict:
        """All layers converted, all but one, every layer split by heads (as far as the family allows)."""
        layers = {layer.index: layer.kv_heads for layer in self.plan.converted}
        exact = {"all": None}
        if len(layers) > 1:
            exact["some"] = [min(layers)]
        if max(layers.values()) > 1:
            exact["heads"] = {index: [0] for index, heads in layers.items() if heads > 1}
        arguments = dict(mixer=self.mixer, window=WINDOW, sinks=SINKS)
        return {shape: student_of(self.teacher, subquad.plan(self.teacher, exact=e, **arguments)) for shape, e in exact.items()}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(c) for c in CASES])
def case(request):
    return Case(*request.param)


def test_window_as_long_as_the_text_is_the_teacher(case):
    arguments = dict(mixer=case.mixer, window=64, sinks=SINKS)
    heads = {layer.index: [layer.kv_heads - 1] for layer in case.plan.converted if layer.kv_heads > 1}
    for exact in (None, heads or None):
        assert_near(full(student_of(case.teacher, exact=exact, **arguments), case.ids), case.teacher_logits, FAMILY, f"exact={exact}")


def test_mixers_bite(case):
    """Past the window a student with random mixers differs from the teacher; otherwise the rest of this file would show nothing."""
    for shape, student in case.students.items():
        assert error(full(student, case.ids)[:, WINDOW + SINKS :], case.teacher_logits[:, WINDOW + SINKS :]) > 100 * FAMILY, shape


ONE_PREFILL = [13, *range(14, LENGTH + 1)]


def cannot(own: torch.Tensor, wanted: torch.Tensor) -> None:
    """A row of OWN_LIMITS is true."""
    assert error(own, wanted) > FAMILY, "the teacher can do it after all: remove the row"


def test_chunks_and_steps_are_the_full_pass(case):
    cuts, mask = STEPS, None
    if "maskless" in case.limits:
        cannot(chunked(case.teacher, case.ids, ONE_PREFILL)[0], case.teacher_logits)
        mask = torch.ones_like(case.ids)
    if "chunks" in case.limits:
        cannot(chunked(case.teacher, case.ids, STEPS, mask)[0], case.teacher_logits)
        cuts = ONE_PREFILL
    if "steps" in case.limits:
        cannot(chunked(case.teacher, case.ids, ONE_PREFILL, mask)[0], case.teacher_logits)
        return
    for shape, student in case.students.items():
        assert_near(chunked(student, case.ids, cuts, mask)[0], full(student, case.ids), FAMILY, shape)


WIDTH = LENGTH + 5


def real(logits: torch.Tensor) -> torch.Tensor:
    """Of a left-padded batch: the logits of real tokens, row after row."""
    return torch.cat([logits[i, WIDTH - n :] for i, n in enumerate(LENGTHS)])


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """The same from one pass a row, without padding."""
    return torch.cat([full(model, ids[i : i + 1, :n], **positions(model, n))[0] for i, n in enumerate(LENGTHS)])


def positions(model, length: int) -> dict:
    """Given explicitly: families that work positions out themselves do not all count from 0."""
    return {"position_ids": torch.arange(length)[None]} if takes_positions(model) else {}


def test_left_padding_changes_nothing(case):
    ids, mask = left_padded(case.ids, LENGTHS, WIDTH)
    if "padding" in case.limits:
        cannot(real(full(case.teacher, ids, **padded_inputs(case.teacher, mask, 0, WIDTH))), alone(case.teacher, case.ids))
        return
    for shape, student in case.students.items():
        assert_near(real(full(student, ids, **padded_inputs(student, mask, 0, WIDTH))), alone(student, case.ids), FAMILY, shape)


def test_left_padding_without_positions_is_as_good_as_the_teachers(case):
    """A plain forward call with a mask alone: where the teacher does not mind (rotary embedding is relative), the student does not either."""
    ids, mask = left_padded(case.ids, LENGTHS, WIDTH)
    if error(real(full(case.teacher, ids, attention_mask=mask)), alone(case.teacher, case.ids)) > FAMILY:
        return
    for shape, student in case.students.items():
        assert_near(real(full(student, ids, attention_mask=mask)), alone(student, case.ids), FAMILY, shape)


def test_left_padding_with_a_cache_changes_nothing(case):
    ids, mask = left_padded(case.ids, LENGTHS, WIDTH)
    if "padding" in case.limits or "steps" in case.limits:
        return
    cuts = [10, 17, *range(18, WIDTH + 1)]
    if "chunks" in case.limits or "padded chunks" in case.limits:
        cannot(real(chunked(case.teacher, ids, cuts, mask)[0]), alone(case.teacher, case.ids))
        cuts = [WIDTH - 2, WIDTH - 1, WIDTH]
    for shape, student in case.students.items():
        assert_near(real(chunked(student, ids, cuts, mask)[0]), alone(student, case.ids), FAMILY, shape)


GENERATION = {  # what -> (students it is tried on, arguments of generate)
    "greedy": (("all", "heads"), dict(do_sample=False)),
    "beams": (("heads", "all"), dict(do_sample=False, num_beams=2)),
    "sampling": (("all",), dict(do_sample=True)),
}


@pytest.mark.parametrize("what", GENERATION)
def test_generation_with_a_cache_is_generation_without(case, what):
    shapes, arguments = GENERATION[what]
    if what in case.limits:
        pytest.skip(case.limits[what])
    if what != "greedy" and case.family != "llama":
        shapes = shapes[:1]
    ids, mask = (case.ids, torch.ones_like(case.ids)) if "padding" in case.limits else left_padded(case.ids, LENGTHS, LENGTH)
    for shape in shapes:
        student, texts = case.students.get(shape, case.students["all"]), []
        for use_cache in (True, False):
            torch.manual_seed(0)
            out = student.generate(ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, use_cache=use_cache, **arguments)
            texts.append(out[:, ids.shape[1] :].tolist())
        assert texts[0] == texts[1], shape


def test_deepcopy_and_restore(case):
    for shape, student in case.students.items():
        before = full(student, case.ids)
        twin = copy.deepcopy(student)
        assert torch.equal(full(twin, case.ids), before), shape
        assert subquad.restore(twin) is twin and type(twin) is type(case.teacher)
        assert torch.equal(full(twin, case.ids), case.teacher_logits), f"{shape}: the restored copy is not the teacher"
        assert list(twin.state_dict()) == list(case.teacher.state_dict())
        assert torch.equal(full(student, case.ids), before), f"{shape}: restoring the copy changed the student"


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_family(model_type):
    changes, words = REFUSED[model_type]
    with pytest.raises(subquad.UserError) as refusal:
        subquad.plan(AutoConfig.for_model(model_type, **{**SIZES, **changes}))
    assert words in str(refusal.value)
    assert any(name in str(refusal.value) for name in (repr(model_type), "Layer 0", "Layer -1"))
