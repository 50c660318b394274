"""What arrives at the seam is honoured or refused, and the model stays an ordinary transformers model."""

import copy
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import tiny_model
from linearize.students import PRESETS, chunked, full, left_padded, padded_inputs, student_of, tokens
from tolerances import FAMILY, assert_near, error
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import subquad
from subquad import UserError
from subquad.linearize.calls import Checkpoint
from subquad.linearize.modes import as_teacher, gated
from subquad.linearize.params import attention_parameters, linear_names, mixer_parameters
from subquad.linearize.seam import seams

SPLIT = {0: [1], 2: [0]}
ARGUMENTS = dict(mixer="gated_delta", window=4, sinks=2, exact=SPLIT)
IDS = tokens(2, 16)
LEFT = torch.tensor([[1] * 16, [0] * 5 + [1] * 11])


@pytest.fixture
def student(tiny_llama):
    return student_of(tiny_llama, **ARGUMENTS)


# --- refused by name ---------------------------------------------------------------------------------------------------------------


def test_4d_mask_is_refused(student):
    with pytest.raises(UserError, match=r"\(2, 1, 16, 16\).*2-D padding mask.*4-D mask cannot be honoured"):
        student(input_ids=IDS, attention_mask=torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize("name", ["position_bias", "alibi", "some_new_float_tensor"])
def test_argument_that_cannot_be_honoured_is_refused(student, name):
    with pytest.raises(UserError, match=f"Layer 0 .*LlamaAttention.* passes {name}.*Keep this layer exact"):
        student(input_ids=IDS, use_cache=False, **{name: torch.zeros(1, 4, 16, 16)})


def test_argument_of_an_unconverted_layer_is_its_own_business(tiny_llama):
    """The same argument is fine while the model runs as its teacher."""
    student = student_of(tiny_llama, **ARGUMENTS)
    with as_teacher(student):
        assert full(student, IDS, some_new_float_tensor=torch.zeros(1)).isfinite().all()


# --- what a mixer is given ---------------------------------------------------------------------------------------------------------


def test_mixer_gets_the_layer_input_and_its_own_heads(tiny_llama):
    """Query head h belongs to key/value head h // R. At position 0 rotary embedding does nothing, so q, k, v are plain projections."""
    student = student_of(tiny_llama, mixer="gla", window=4, sinks=2, exact={1: [0]})
    layer, seen = student.model.layers[1], {}
    layer.self_attn.mixer.register_forward_pre_hook(lambda m, args: seen.update(call=args[0]))
    layer.input_layernorm.register_forward_hook(lambda m, args, out: seen.update(hidden=out))
    with torch.no_grad():
        full(student, IDS)
        call, hidden, attention = seen["call"], seen["hidden"], layer.self_attn
        assert torch.equal(call.hidden_BTD, hidden) and call.scale == attention.scaling and call.state is None
        q, k, v = (f(hidden)[:, 0].unflatten(-1, (-1, 16)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert call.q_BTGRK.shape == (2, 16, 1, 2, 16)
    assert_near(call.q_BTGRK[:, 0, 0], q[:, 2:4], FAMILY)
    assert_near(call.k_BTGK[:, 0, 0], k[:, 1], FAMILY)
    assert_near(call.v_BTGV[:, 0, 0], v[:, 1], FAMILY)


# --- the implementation behind the seam --------------------------------------------------------------------------------------------


def test_implementation_may_be_switched_after_conversion(student):
    wanted = full(student, IDS)
    for name in ("eager", "sdpa"):
        student.set_attn_implementation(name)
        assert_near(full(student, IDS), wanted, FAMILY, name)
        assert_near(chunked(student, IDS, [9, 15, 16])[0], wanted, FAMILY, f"{name}, chunked")
        assert student.config._attn_implementation == name


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_calls_in_two_threads_do_not_mix(student, cached):
    """One call waits inside its first attention module while another runs: as a server with several threads calls a model."""
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(module, args):
        if threading.current_thread() is other:
            inside.set()
            assert go_on.wait(60)

    other = threading.Thread(target=lambda: found.append(student(input_ids=IDS, use_cache=cached).logits))
    wanted = student(input_ids=IDS, use_cache=cached).logits
    hook = student.model.layers[0].self_attn.q_proj.register_forward_pre_hook(wait)
    other.start()
    assert inside.wait(60)
    beside = tokens(*IDS.shape, seed=1)
    alone = student(input_ids=beside, use_cache=cached).logits
    go_on.set()
    other.join()
    hook.remove()
    assert torch.equal(found[0], wanted) and torch.equal(alone, student(input_ids=beside, use_cache=cached).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_converted_under_either_implementation(implementation):
    teacher = tiny_model(attn_implementation=implementation)
    assert_near(full(student_of(teacher, **ARGUMENTS), IDS), full(student_of(tiny_model(), **ARGUMENTS), IDS), FAMILY)


def test_seam_leaves_no_trace(student, tiny_llama):
    assert [s.index for s in seams(student)] == [0, 1, 2]
    assert not [name for name in student.state_dict() if "seam" in name]
    restored = subquad.restore(student)
    assert seams(restored) == [] and not any("mixer" in name for name in restored.state_dict())
    assert all(m.config is restored.config for m in restored.modules() if hasattr(m, "layer_idx") and hasattr(m, "config"))
    assert torch.equal(full(restored, IDS), full(tiny_llama, IDS))


def test_a_copy_is_its_own_model(student):
    """What one copy notes about its call (padding, cache) must not reach the other."""
    twin, wanted = copy.deepcopy(student), full(student, IDS)
    for one, other in zip(seams(student), seams(twin), strict=True):
        assert one is not other and other.module is not one.module and one.root is not other.root
    ids, mask = left_padded(IDS, (16, 3), 16)
    full(twin, ids, attention_mask=mask)
    assert torch.equal(full(student, IDS), wanted)
    assert type(twin) is type(student)


def test_a_pickle_is_its_own_model(student, tmp_path):
    """torch.save and processes that are spawned pickle the whole model; its class is made in memory, and no module holds it."""
    torch.save(student, tmp_path / "student.pt")
    twin = torch.load(tmp_path / "student.pt", weights_only=False)
    assert type(twin) is type(student) and twin.subquad_plan == student.subquad_plan
    assert torch.equal(full(twin, IDS), full(student, IDS))
    assert torch.equal(full(subquad.restore(twin), IDS), full(pickle.loads(pickle.dumps(twin)), IDS))


def test_converting_twice_is_refused(student):
    with pytest.raises(UserError, match="already converted"):
        subquad.linearize(student, student.subquad_plan)


def test_a_plan_for_another_model_is_refused_before_anything_is_touched(tiny_llama):
    plan = subquad.plan(tiny_model("gpt2", n_embd=64, n_layer=3, n_head=4))
    before = list(tiny_llama.state_dict())
    with pytest.raises(UserError, match="does not have"):
        subquad.linearize(tiny_llama, plan)
    assert seams(tiny_llama) == [] and list(tiny_llama.state_dict()) == before


# --- batches -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", PRESETS)
def test_packed_documents_are_separate_documents(tiny_llama, mixer):
    student = student_of(tiny_llama, **{**ARGUMENTS, "mixer": mixer})
    lengths = (7, 5, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    wanted = torch.cat([full(student, part) for part in IDS[:1].split(lengths, 1)], 1)
    assert_near(full(student, IDS[:1], position_ids=positions), wanted, FAMILY)


@pytest.mark.parametrize("mixer", PRESETS)
def test_right_padding_changes_nothing(tiny_llama, mixer):
    student = student_of(tiny_llama, **{**ARGUMENTS, "mixer": mixer})
    mask = torch.tensor([[1] * 16, [1] * 9 + [0] * 7])
    out = full(student, IDS, attention_mask=mask)
    assert_near(out[0], full(student, IDS)[0], FAMILY)
    assert_near(out[1:, :9], full(student, IDS[1:, :9]), FAMILY)


def test_a_row_of_nothing_but_padding_gives_no_nan(student):
    mask = torch.tensor([[1] * 16, [0] * 16])
    for out in (full(student, IDS, attention_mask=mask), chunked(student, IDS, [9, 16], mask)[0]):
        assert out.isfinite().all()
        assert_near(out[0], full(student, IDS)[0], FAMILY)


def test_mask_of_ones_and_no_mask_are_one(student):
    assert torch.equal(full(student, IDS), full(student, IDS, attention_mask=torch.ones_like(IDS)))


POSITIONAL = {
    "ids, mask": (IDS, LEFT),
    "ids, mask, None": (IDS, LEFT, None),
    "ids, mask, positions": (IDS, LEFT, (LEFT.cumsum(1) - 1).clamp_min(0)),
}


@pytest.mark.parametrize("what", POSITIONAL)
def test_arguments_may_be_given_by_position(student, what):
    with torch.no_grad():
        assert torch.equal(student(*POSITIONAL[what], use_cache=False).logits, full(student, IDS, attention_mask=LEFT))


# --- layers in which the teacher runs a window of its own --------------------------------------------------------------------------

WINDOWED = {
    "gemma2": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "mistral": {"sliding_window": 8},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_layers_can_be_converted_when_named(family):
    teacher = tiny_model(family, **WINDOWED[family])
    plan = subquad.plan(teacher, window=64, sinks=0, layers=[0, 1, 2])
    assert plan.layers[1].window == 8 and plan.layers[0].window == (8 if family == "mistral" else 64)
    assert_near(full(student_of(teacher, plan), IDS), full(teacher, IDS), FAMILY, "a window as long as the teacher's is the teacher")
    ids, mask = left_padded(IDS, (16, 5), 20)
    for exact in (None, {0: [0], 1: [1], 2: [0]}):
        student = student_of(teacher, mixer="gla", window=4, sinks=2, layers=[0, 1, 2], exact=exact)
        wanted = full(student, IDS)
        assert_near(chunked(student, IDS, [9, 12, 13, 14, 15, 16])[0], wanted, FAMILY, f"exact={exact}")
        alone = torch.cat([wanted[0], full(student, IDS[1:, :5])[0]])
        padded = full(student, ids, **padded_inputs(student, mask, 0, 20))
        assert_near(torch.cat([padded[0, 4:], padded[1, 15:]]), alone, FAMILY, f"exact={exact}, left padding")
        padded = chunked(student, ids, [12, 17, 18, 19, 20], mask)[0]
        assert_near(torch.cat([padded[0, 4:], padded[1, 15:]]), alone, FAMILY, f"exact={exact}, left padding in chunks")


# --- training ----------------------------------------------------------------------------------------------------------------------


def gradients(model, ids, **kwargs) -> dict:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixer", PRESETS)
def test_gradient_checkpointing_changes_nothing(tiny_llama, mixer):
    student = student_of(tiny_llama, **{**ARGUMENTS, "mixer": mixer}).train()
    wanted = gradients(student, IDS, attention_mask=LEFT)
    assert set(wanted) == {name for name, _ in student.named_parameters()}
    student.gradient_checkpointing_enable()
    found = gradients(student, IDS, attention_mask=LEFT)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert_near(gradient, wanted[name], FAMILY, name)


GATES = {i: torch.tensor([0.3, 0.8]) for i in range(3)}
SWITCHED = {  # what -> (mode, mask, positions) of two forward calls before one backward pass, which finds neither under way
    "as many real tokens": ((nullcontext, LEFT, None), (nullcontext, LEFT.flip(0), None)),
    "other numbers of real tokens": ((nullcontext, LEFT, None), (nullcontext, None, None)),
    "packed, then plain": ((nullcontext, None, torch.arange(16).remainder(7)[None]), (nullcontext, None, None)),
    "as teacher, then student": ((as_teacher, LEFT, None), (nullcontext, LEFT, None)),
    "gated, then teacher": ((partial(gated, gates=GATES), None, None), (as_teacher, None, None)),
}


def gradients_of_two(model, calls) -> dict:
    model.zero_grad()
    loss = 0.0
    for seed, (mode, mask, positions) in enumerate(calls):
        with mode(model):
            logits = model(input_ids=tokens(2, 16, seed), attention_mask=mask, position_ids=positions, use_cache=False).logits
        loss = loss + (logits if mask is None else logits[mask.bool()]).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("what", SWITCHED)
def test_gradient_checkpointing_of_two_calls_before_one_backward(student, what, reentrant):
    wanted = gradients_of_two(student.train(), SWITCHED[what])
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (student, copy.deepcopy(student)):
        found = gradients_of_two(model, SWITCHED[what])
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert_near(gradient, wanted[name], FAMILY, name)
    assert not [m for m in subquad.restore(student).modules() if isinstance(m.__dict__.get("_gradient_checkpointing_func"), Checkpoint)]


def test_other_checkpoints(student):
    """torch's wrapper says of which call a layer is; checkpoint() around a single layer does not, and wrong gradients would be silent."""
    calls = SWITCHED["as many real tokens"]
    wanted = gradients_of_two(student.train(), calls)
    bare, layers = copy.deepcopy(student), student.model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    for name, gradient in gradients_of_two(student, calls).items():
        assert_near(gradient, wanted[name.replace("_checkpoint_wrapped_module.", "")], FAMILY, name)
    forward = bare.model.layers[1].forward
    bare.model.layers[1].forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with pytest.raises(UserError, match=r"run again in the backward pass.*does not say of which call"):
        gradients_of_two(bare, calls)


def test_gradients_do_not_change_the_output(student):
    assert torch.equal(student(input_ids=IDS, use_cache=False).logits.detach(), full(student, IDS))
    with torch.inference_mode():
        assert torch.equal(student(input_ids=IDS, use_cache=False).logits, full(student, IDS))


def test_bf16_model_runs_and_keeps_its_mixers_in_fp32(tiny_llama):
    wanted = full(student_of(tiny_llama, **ARGUMENTS), IDS)
    student = student_of(copy.deepcopy(tiny_llama).bfloat16(), **ARGUMENTS)
    assert all(p.dtype == torch.float32 for p in mixer_parameters(student).values())
    out = full(student, IDS)
    assert out.dtype == torch.bfloat16 and error(out, wanted) < 0.1  # three layers of 8-bit mantissas
    assert chunked(student, IDS, [9, 16])[0].dtype == torch.bfloat16


# --- which parameters belong to what -----------------------------------------------------------------------------------------------


def test_parameters_by_name(student):
    every = dict(student.named_parameters())
    mixers, attention = mixer_parameters(student), attention_parameters(student)
    assert mixers and all(every[name] is p for name, p in (mixers | attention).items())
    assert set(mixers) == {name for name in every if ".mixer." in name}
    assert set(attention) == {name for name in every if ".self_attn." in name}


def test_linear_names_are_the_teachers(student):
    modules = dict(student.named_modules())
    names = linear_names(student)
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    assert all(isinstance(modules[name], torch.nn.Linear) for name in names)
    gpt2 = student_of(tiny_model("gpt2", n_embd=64, n_layer=3, n_head=4), exact=[0])
    assert linear_names(gpt2) == [f"transformer.h.{i}.attn.{p}" for i in (1, 2) for p in ("c_attn", "c_proj")]
