"""Every preset, and the options that change its form: one set of numbers in all its forms.

definition (pairs of tokens written out) = one call = chunked prefill = step by step = left-padded batch = right padding = packed documents.
Mixer parameters are random: as built, gates are nearly closed and these tests would hardly bite.

Key: B batch, T tokens, D model size, G key/value heads, R query heads per key/value head, K key size, V value size, W window, N sinks.
"""

import pickle
from dataclasses import replace

import pytest
import torch
from tolerances import BF16, EXACT_START, MIXER, MIXER_GRADIENT, OWN_GRADIENT, assert_near, error, gradient_errors

from subquad.linearize.layout import packed, padded
from subquad.linearize.mixers import MIXERS, build, causal, pieces
from subquad.linearize.mixers.base import AttentionCall, HeadShape
from subquad.linearize.mixers.definition import definition
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.knobs import DEFAULTS, rows_of
from subquad.linearize.mixers.memory import open_parts
from subquad.linearize.state import MixerState

B, D, G, K, V = 3, 24, 2, 8, 6
W, N = 6, 2

CASES = {name: (name, {}) for name in causal()}
CASES |= {f"window_linear {m}": ("window_linear", {"feature_map": m}) for m in ("hedgehog_exp", "hedgehog_softmax", "favor", "elu1")}
CASES |= {
    "window_linear scalar": ("window_linear", {"decay": "scalar"}),
    "window_linear vector": ("window_linear", {"decay": "vector"}),
    "window_linear gated": ("window_linear", {"combine": "gated"}),
    "gla scalar": ("gla", {"decay": "scalar"}),
    "gla none": ("gla", {"decay": "none"}),
    "gla joint": ("gla", {"combine": "joint"}),
    "gated_delta none": ("gated_delta", {"decay": "none"}),
    "lola": ("lola", {"cache": 5}),  # of its own size, nothing would be written at these lengths
    "window_linear cache": ("window_linear", {"cache": 5}),
    "fox scalable": ("fox", {"weights": "scalable"}),
    "fox sigmoid": ("fox", {"weights": "sigmoid"}),
    "fox blocks": ("fox", {"blocks": True, "top": 2}),
    "gla cache": ("gla", {"cache": 5, "position": "drop", "decay": "scalar"}),
    "lizard cache": ("lizard", {"cache": 1}),
    "gated_deltanet cache": ("gated_deltanet", {"cache": 5}),
    "gated_linear cache": ("gated_linear", {"cache": 5}),
    "performer cache": ("performer", {"cache": 5}),
    "l2vit cache": ("l2vit", {"cache": 5}),
    "hgrn2 cache": ("hgrn2", {"cache": 5}),
    "rodimus cache": ("rodimus", {"cache": 5}),
    "mamba2 cache": ("mamba2", {"cache": 5}),
}
# Bases under levels: every write that has them, every kind of decay, joint normalisers, exponents, key weights.
LEVELLED = {
    "linear": {}, "performer": {}, "hedgehog_exp": {"combine": "joint"}, "lolcats": {}, "retnet": {}, "l2vit": {}, "rala": {}, "gated_linear": {},
    "gla": {"combine": "joint", "decay": "own_vector"}, "liger": {}, "mamba2": {}, "hgrn2": {}, "rodimus": {}, "gateloop": {}, "lizard": {},
    "deltanet": {}, "gated_delta": {},
}  # fmt: skip
CASES |= {f"{name} levels": (name, {**options, "container": "levels"}) for name, options in LEVELLED.items()}
# Others that come before the window in the place of beside it; every kind of part, gate and query map.
FIRST = {
    "t2r": {}, "performer": {}, "gsa": {}, "abc": {}, "sse": {}, "log_linear": {}, "log_linear_delta": {}, "gated_deltanet": {}, "hgrn2": {},
    "flowformer": {}, "gateloop": {}, "mamba": {}, "gla": {"position": "drop"},
}  # fmt: skip
CASES |= {f"{name} first": (name, {**options, "combine": "sequential"}) for name, options in FIRST.items()}
# Slots around the recurrences that have them.
SLOTTED = {
    "none": ("abc", {}), "scalar": ("abc", {"decay": "scalar"}), "fixed": ("abc", {"decay": "fixed", "position": "keep"}),
    "own_vector": ("abc", {"decay": "own_vector"}), "vector, logits": ("nha", {"decay": "vector"}), "step": ("abc", {"decay": "step_size", "write": "step"}),
    "dual": ("abc", {"decay": "dual", "write": "dual", "output": "norm_gate"}), "joint": ("gsa", {"combine": "joint", "decay": "scalar"}),
    "delta": ("abc", {"write": "delta"}), "delta, now": ("nha", {"write": "delta", "decay": "scalar", "slots": 16}),
    "delta first": ("delta_slots", {"combine": "sequential"}),
}  # fmt: skip
CASES |= {f"slots {what}": (name, {**options, "container": "slots"}) for what, (name, options) in SLOTTED.items()}
every = pytest.mark.parametrize("case", CASES)


def tempered(name: str, options: dict) -> bool:
    """A cell whose map takes q.k times the teacher's scale."""
    preset = MIXERS[name]
    return preset.uses == "cell" and rows_of({**DEFAULTS, **preset.pieces, **options}).feature_map.tempered


# The direction of encoders; test_encoders.py has the formulas of some of them.
BOTH_WAYS = {
    f"{name}, both ways": (name, {"combine": "alone"} if preset.uses == "cell" else {})
    for name, preset in MIXERS.items()
    if "bidirectional" in preset.directions
}


def mixer_of(case: str, groups: int = 3, window: int = W, sinks: int = N, size: int | None = None, heads: int = G):
    name, options = (CASES | BOTH_WAYS)[case]
    mixer = build(name, HeadShape(D, heads, groups, size or K, size or V), window, sinks, options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mixer


def call_of(length: int, groups: int = 3, batch: int = B, size: int | None = None, heads: int = G, **more) -> AttentionCall:
    generator = torch.Generator().manual_seed(length)
    K_, V_ = size or K, size or V
    sizes = ((heads, groups, K_), (heads, K_), (heads, V_), (D,), (heads, groups, K_), (heads, K_))
    q, k, v, hidden, plain_q, plain_k = (torch.randn(batch, length, *x, generator=generator) for x in sizes)
    return AttentionCall(q, k, v, hidden, K_**-0.5, fewest=length, plain_q_BTGRK=plain_q, plain_k_BTGK=plain_k, **more)


TENSORS = ("q_BTGRK", "k_BTGK", "v_BTGV", "hidden_BTD", "plain_q_BTGRK", "plain_k_BTGK")


def part(call: AttentionCall, rows=slice(None), cols=slice(None), **more) -> AttentionCall:
    """Some rows and tokens of a call."""
    cut = {name: getattr(call, name)[rows, cols] for name in TENSORS}
    return replace(call, **cut, fewest=cut["q_BTGRK"].shape[1], **more)


def through_layout(mixer, call: AttentionCall, layout, state=None) -> torch.Tensor:
    """What the seam does with a padded or packed call."""
    rows, length = call.q_BTGRK.shape[:2]
    if layout is None:
        return mixer(replace(call, state=state))
    moved = {name: layout.gather(getattr(call, name)) for name in TENSORS}
    return layout.scatter(mixer(replace(call, **moved, real_BT=layout.real_DL, fewest=layout.fewest, state=state)), rows, length)


@every
def test_one_call_is_the_definition(case):
    """Lengths around the window and the chunks, on small heads."""
    mixer = mixer_of(case)
    for length in (1, W, W + N + 1, 63, 64, 65):
        call = call_of(length, batch=1)
        assert_near(mixer(call), definition(mixer, call), MIXER, f"length {length}")
    mixer, call = mixer_of(case, groups=1), call_of(500, groups=1, batch=1)
    assert_near(mixer(call), definition(mixer, call), MIXER, "length 500")


ORDER = list(CASES)
HEADS = [(size, groups) for size in (64, 80, 128) for groups in (1, 3, 8)]


@every
def test_head_sizes_and_query_groups(case):
    """Real head sizes and every size of query group; each case takes one pair of the nine, so that all pairs and all cases are covered."""
    size, groups = HEADS[ORDER.index(case) % len(HEADS)]
    mixer, call = mixer_of(case, groups, size=size), call_of(65, groups, batch=1, size=size)
    assert_near(mixer(call), definition(mixer, call), MIXER, f"head size {size}, {groups} queries per key")


# The window's own arithmetic is the same for all; these read and write beside it in different ways.
BESIDE = "window window_linear gla gated_delta gated_deltanet nha performer flowformer mala swat delta_attention rodimus_plus".split()


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize(("window", "sinks"), [(6, 0), (1, 0), (1, 1), (70, 4), (3, 9)])
def test_windows_and_sinks(case, window, sinks):
    mixer, call = mixer_of(case, window=window, sinks=sinks), call_of(90, batch=1)
    assert_near(mixer(call), definition(mixer, call), MIXER)


@every
def test_softcap_and_learned_sinks(case):
    mixer, call = mixer_of(case), call_of(40)
    plain = mixer(call)
    for more in ({"softcap": 1.0}, {"sink_logit_GR": torch.linspace(-1, 1, G * 3).view(G, 3)}):
        changed = replace(call, **more)
        assert_near(mixer(changed), definition(mixer, changed), MIXER, str(list(more)))
        assert error(mixer(changed), plain) > 100 * MIXER, f"{list(more)} had no effect"


@pytest.mark.parametrize("case", [case for case, (name, options) in CASES.items() if tempered(name, options)])
def test_maps_see_the_teachers_scale(case):
    """Scores of half the usual scale are those of queries of half the size: to the features as to the window (Granite, Gemma)."""
    mixer, call = mixer_of(case), call_of(40)
    smaller = {name: getattr(call, name) / 2 for name in ("q_BTGRK", "plain_q_BTGRK")}
    assert_near(mixer(replace(call, scale=call.scale / 2)), mixer(replace(call, **smaller)), MIXER)


def gradients(mixer, call: AttentionCall, form, weight) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(what `form` gives, gradients of its sum weighted by `weight`: of the call's tensors and of parameters, those that have one)."""
    mixer.zero_grad()
    leaves = {name: getattr(call, name).clone().requires_grad_() for name in TENSORS}
    out = form(replace(call, **leaves))
    (out * weight).sum().backward()
    found = {n: x.grad for n, x in leaves.items()} | {n: p.grad for n, p in mixer.named_parameters()}
    return out.detach(), {n: x for n, x in found.items() if x is not None}


@every
def test_gradients_are_the_definitions(case):
    mixer, call = mixer_of(case), call_of(70)
    weight = torch.randn_like(call.q_BTGRK[..., :1]) * torch.randn(V)
    found = [gradients(mixer, call, form, weight)[1] for form in (mixer.forward, lambda c: definition(mixer, c))]
    assert found[0].keys() == found[1].keys()
    assert len(list(mixer.parameters())) == sum(n not in TENSORS for n in found[0]), "a parameter gets no gradient"
    for least, allowed in ((1e-2, MIXER_GRADIENT), (0.0, OWN_GRADIENT)):
        for name, off in gradient_errors(*found, least):
            assert off <= allowed, f"{name} off by {off:.2e}, allowed {allowed:.0e}"


@pytest.mark.parametrize("name", LEVELLED)
def test_levels_of_weight_one_are_the_base(name):
    """As built, the container changes nothing: a converted layer can be upgraded as it stands."""
    base = mixer_of(f"{name} levels")
    plain, levelled = (build(name, base.shape, W, N, {**LEVELLED[name], **more}) for more in ({}, {"container": "levels"}))
    missing = levelled.load_state_dict({n: p for n, p in base.state_dict().items() if not n.startswith("levels")}, strict=False)
    plain.load_state_dict(levelled.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"levels.weight", "levels.bias"} == set(levelled.state_dict()) - set(plain.state_dict())
    call = call_of(150)
    with torch.no_grad():
        assert_near(levelled(call), plain(call), 1e-5)
        assert_near(run(levelled, call, [100, *range(101, 151)])[0], plain(call), 1e-5)


def test_slots_around_plain_sums_are_abc():
    wrapped, call = mixer_of("slots none"), call_of(100)
    own = build("abc", wrapped.shape, W, N)
    own.load_state_dict(wrapped.state_dict())
    with torch.no_grad():
        assert_near(wrapped(call), own(call), 1e-5)
        assert_near(run(wrapped, call, [90, *range(91, 101)])[0], own(call), 1e-5)


CUTS = {
    "one call": [50],
    "chunks": [3, 20, 21, 44, 50],
    "steps": list(range(1, 51)),
    "prefill and steps": [40, *range(41, 51)],
    "first chunk below the window": [4, 50],
    "chunks of the window": [W, 2 * W, 50],
}


def run(mixer, call: AttentionCall, cuts: list[int], mask=None):
    """(output, state) of calls over the tokens up to each cut."""
    state, outs, start = MixerState(), [], 0
    for end in cuts:
        layout = None if mask is None else padded(mask[:, start:end])
        outs.append(through_layout(mixer, part(call, cols=slice(start, end)), layout, state))
        start = end
    return torch.cat(outs, 1), state


STATE = ("window_k", "window_v", "window_extra", "sink_k", "sink_v", "memory", "seen_B")


def memory_parts(mixer, memory) -> dict[str, torch.Tensor]:
    """What a cell remembers of one sequence by its named parts, each of which has a scale of its own."""
    shapes = getattr(mixer, "part_shapes", None)
    if memory is None and shapes is None:
        return {}
    return {"memory": memory[None]} if shapes is None else open_parts(None if memory is None else memory[None], shapes, torch.zeros(1, 1))


def part_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """As `error`; the log of nothing (-1e30) must stand in the same places and is no scale for other numbers."""
    nothing = wanted <= NOTHING / 2
    same = torch.equal(nothing, found <= NOTHING / 2)
    return error(found.masked_fill(nothing, 0.0), wanted.masked_fill(nothing, 0.0)) if same else float("inf")


def state_errors(mixer, state: MixerState, row: int, alone: MixerState, n: int) -> dict[str, float]:
    """By name: how far row `row` of a state is from that of its `n` tokens alone."""
    found = {"seen_B": float(state.seen_B[row] != n)}
    for name in ("window_k", "window_v", "window_extra"):
        if getattr(alone, name) is not None:
            kept = getattr(alone, name).shape[1]
            found[name] = error(getattr(state, name)[row, -kept:], getattr(alone, name)[0])
    for name in ("sink_k", "sink_v") if alone.sink_k is not None else ():
        found[name] = error(getattr(state, name)[row, : min(n, N)], getattr(alone, name)[0, : min(n, N)])
    assert alone.memory is None or state.memory is not None, "no memory is left"
    if state.memory is not None:
        wanted = memory_parts(mixer, None if alone.memory is None else alone.memory[0])
        found |= {f"memory.{name}": part_error(x, wanted[name]) for name, x in memory_parts(mixer, state.memory[row]).items()}
    return found


@every
def test_chunks_and_steps_are_one_call(case):
    """Outputs, and the state that is left."""
    mixer, call = mixer_of(case), call_of(50)
    with torch.no_grad():
        wanted = mixer(call)
        _, wanted_state = run(mixer, call, CUTS["one call"])
        for what, cuts in CUTS.items():
            out, state = run(mixer, call, cuts)
            assert_near(out, wanted, MIXER, what)
            assert state.fewest == 50
            for name in STATE:
                one, other = getattr(state, name), getattr(wanted_state, name)
                assert (one is None) == (other is None), (what, name)
                if one is not None:
                    assert_near(one, other, MIXER, f"{what}: state.{name}")
            for row in range(B if state.memory is not None else 0):
                for name, one in memory_parts(mixer, state.memory[row]).items():
                    other = memory_parts(mixer, wanted_state.memory[row])[name]
                    assert part_error(one, other) <= MIXER, f"{what}: memory.{name} of row {row}"


@every
def test_state_is_fp32_and_small(case):
    """In bf16 the window is kept as it comes and the recurrent state in fp32, of a size that does not grow."""
    mixer, call = mixer_of(case), call_of(40)
    call = part(replace(call, **{name: getattr(call, name).bfloat16() for name in TENSORS}))
    with torch.no_grad():
        out, state = run(mixer, call, [20, 40])
        sizes = [x.shape for x in state.tensors()]
        mixer(part(call, state=state))
    assert out.dtype == state.window_k.dtype == torch.bfloat16
    assert state.sink_v is None or state.sink_v.dtype == torch.bfloat16
    assert state.memory is None or state.memory.dtype == torch.float32
    if windowed(case):
        assert [x.shape for x in state.tensors()] == sizes and state.window_k.shape[1] == W
    if state.memory is not None:
        assert state.memory[0].numel() * 4 == mixer.memory_bytes(mixer.shape, **pieces(*CASES[case]))


LENGTHS = (30, 13, 3, 0)  # the last row is nothing but padding


def padded_batch(side: str):
    """(call, mask) of rows of LENGTHS real tokens in a batch 33 wide."""
    call, mask = call_of(33, batch=len(LENGTHS)), torch.zeros(len(LENGTHS), 33, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        if side == "left":
            mask[row, 33 - n :] = 1
        elif side == "right":
            mask[row, :n] = 1
        else:  # holes
            mask[row, torch.randperm(33, generator=torch.Generator().manual_seed(row))[:n]] = 1
    return call, mask


@every
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(case, side):
    mixer = mixer_of(case)
    call, mask = padded_batch(side)
    with torch.no_grad():
        out = through_layout(mixer, call, padded(mask))
        parts = run(mixer, call, [11, 12, 25, 33], mask)[0]
        assert out.isfinite().all() and parts.isfinite().all()
        for row, n in enumerate(LENGTHS):
            if n == 0:
                continue
            real = mask[row].bool()
            alone = mixer(part(call, slice(row, row + 1), real.nonzero().flatten()))
            assert_near(out[row : row + 1, real], alone, MIXER, f"row {row}")
            assert_near(parts[row : row + 1, real], alone, MIXER, f"row {row}, in chunks")


def windowed(case: str) -> bool:
    """The case keeps no more tokens than the window."""
    return type(mixer_of(case)).kept_tokens(10**6, W, N, **pieces(*CASES[case]))[0] <= W


@every
def test_state_of_a_padded_batch_is_each_rows_own(case):
    mixer = mixer_of(case)
    call, mask = padded_batch("left")
    with torch.no_grad():
        _, state = run(mixer, call, [11, 33], mask)
        assert state.seen_B.tolist() == list(LENGTHS)
        for row, n in enumerate(LENGTHS):
            if n == 0:
                continue
            _, alone = run(mixer, part(call, slice(row, row + 1), slice(33 - n, 33)), [n])
            assert alone.window_k.shape[1] == min(n, W) or not windowed(case)
            for name, off in state_errors(mixer, state, row, alone, n).items():
                assert off <= MIXER, f"row {row}: {name} off by {off:.2e}"


@every
def test_padding_gives_no_gradient(case):
    """Training on a right-padded batch: what stands in the padded places changes nothing and gets no gradient."""
    mixer = mixer_of(case)
    call, mask = padded_batch("right")
    leaves = {name: getattr(call, name).clone().requires_grad_() for name in TENSORS}
    through_layout(mixer, replace(call, **leaves), padded(mask)).square().sum().backward()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert leaf.grad.isfinite().all() and not leaf.grad[~mask.bool()].any(), name
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@every
def test_packed_documents_are_separate_documents(case):
    mixer, call = mixer_of(case), call_of(40, batch=2)
    lengths = ((17, 20, 3), (40,))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        out = through_layout(mixer, call, packed(positions, 2))
        for row, documents in enumerate(lengths):
            start = 0
            for n in documents:
                alone = mixer(part(call, slice(row, row + 1), slice(start, start + n)))
                assert_near(out[row : row + 1, start : start + n], alone, MIXER, f"row {row} from {start}")
                start += n


@pytest.mark.parametrize("case", [*causal(), "gla levels"])
def test_pickles(case):
    mixer, call = mixer_of(case), call_of(20)
    assert torch.equal(pickle.loads(pickle.dumps(mixer))(call), mixer(call))


@every
@pytest.mark.parametrize("times", [30, 1000])
def test_large_logits_stay_finite(case, times):
    mixer, call = mixer_of(case), call_of(40)
    leaves = {name: getattr(call, name).clone().requires_grad_() for name in TENSORS}
    leaves["q_BTGRK"] = (call.q_BTGRK * times).requires_grad_()
    out = mixer(replace(call, **leaves))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (*leaves.values(), *mixer.parameters()) if x.grad is not None)


@pytest.mark.parametrize("case", [*CASES, *BOTH_WAYS])
@pytest.mark.parametrize(("times", "plus"), [(-300, 0), (300, 0), (1, -60)])
def test_large_gates_stay_finite(case, times, plus):
    """Logits of gates in the hundreds, of both signs, and all of them far below 0: softplus, sigmoids and their logarithms at their ends."""
    mixer, call = mixer_of(case), call_of(40, causal=case not in BOTH_WAYS)
    with torch.no_grad():
        for gate in mixer.modules():
            if isinstance(gate, InputGate):
                gate.weight.mul_(times)
                gate.bias.add_(plus)
    out, slopes = gradients(mixer, call, mixer, torch.ones(1))
    assert all(x.isfinite().all() for x in (out, *slopes.values()))


BY_WINDOW = [
    case for case in CASES if MIXERS[CASES[case][0]].exact == "a window as long as the text" and "sequential" not in CASES[case][1].values()
]


@pytest.mark.parametrize("case", [case for case in BY_WINDOW if CASES[case][0] not in ("swat", "nsa")])
def test_nothing_older_is_the_window(case):
    """As long as nothing has left the window and the sinks, the output is the teacher's, bit for bit the window's."""
    mixer, call = mixer_of(case), call_of(W + N)
    window = build("window", mixer.shape, W, N)
    assert torch.equal(mixer(call)[:, :W], window(call)[:, :W])
    assert_near(mixer(call), window(call), MIXER)
    longer = call_of(40)
    different = error(mixer(longer), window(longer)) > 100 * MIXER
    assert different == (CASES[case][0] != "window")


@pytest.mark.parametrize("case", [case for case in BY_WINDOW if CASES[case][0] not in ("swat", "nsa")])
def test_very_negative_logits_leave_the_window_in_charge(case):
    """Logits far below the linear branch's share, before and after anything has left the window."""
    mixer, call = mixer_of(case), call_of(W + 4)
    call = replace(call, q_BTGRK=torch.full_like(call.q_BTGRK, -40.0), k_BTGK=call.k_BTGK.abs() + 1)
    assert_near(mixer(call)[:, : W + N], build("window", mixer.shape, W, N)(call)[:, : W + N], MIXER)


def set_bias(value):
    def change(mixer):
        for name, parameter in mixer.named_parameters():
            if name.startswith(("forget", "gate")):
                parameter.data.fill_(value) if name.endswith("bias") else parameter.data.zero_()

    return change


def nothing_added(mixer):
    mixer.enrich.bias.data.fill_(float("-inf"))


def nsa_window_only(mixer):
    mixer.gate.weight.data.zero_()
    mixer.gate.bias.data.copy_(torch.tensor([-40.0, -40.0, 40.0]).repeat(mixer.shape.kv_heads * mixer.shape.groups))


# Preset -> (window, options, what is done to the mixer): the setting of its `exact`, where it is not a window as long as the text.
EXACT = {
    "blocked_softmax": (W, {}, lambda mixer: None),
    "moba": (W, {"top": 100}, lambda mixer: None),
    "nsa": (200, {}, nsa_window_only),
    "delta_attention": (W, {"stride": 1}, lambda mixer: None),
    "rodimus_plus": (200, {}, nothing_added),
    "titans_mal": (200, {}, nothing_added),
    "scalable_softmax": (W, {}, None),  # at its length of reference
    "fox": (W, {}, set_bias(40.0)),
    "softmax1": (W, {}, lambda mixer: mixer.p.data.fill_(-40.0)),
    "clipped_softmax": (W, {}, lambda mixer: mixer.p.data.fill_(0.0)),
    "gated_attention": (W, {}, set_bias(40.0)),
}


def exact_start(name: str, groups: int = 3, size: int | None = None, heads: int = G) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher) with the setting that the preset names."""
    window, options, change = EXACT.get(name, (200, {}, lambda mixer: None))
    mixer = build(name, HeadShape(D, heads, groups, size or K, size or V), window, N, options)
    call = call_of(130, groups, size=size, heads=heads)
    if change is None:  # scalable softmax: p ln n = 1 at the last query
        mixer.p.data.fill_(1 / torch.tensor(130.0).log().item())
        return mixer(call)[:, -1], attended(call)[:, -1]
    change(mixer)
    return mixer(call), attended(call)


WITH_EXACT_START = [name for name in causal() if MIXERS[name].exact]


@pytest.mark.parametrize("name", WITH_EXACT_START)
def test_exact_start(name):
    """With the setting that the preset names, the student is the teacher to 1e-5."""
    assert_near(*exact_start(name), EXACT_START)


def attended(call: AttentionCall) -> torch.Tensor:
    q = call.q_BTGRK.flatten(2, 3).transpose(1, 2)
    k, v = (x.repeat_interleave(call.q_BTGRK.shape[3], 2).transpose(1, 2) for x in (call.k_BTGK, call.v_BTGV))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale)
    return out.transpose(1, 2).unflatten(2, call.q_BTGRK.shape[2:4])


def bf16_run(case: str, tokens: int, size: int | None = None, heads: int = G) -> tuple[torch.Tensor, torch.Tensor]:
    """(a bf16 model with an fp32 state over 4,096 tokens in calls of `tokens`, fp32 arithmetic on the same rounded numbers)."""
    mixer, call = mixer_of(case, groups=1, size=size, heads=heads), call_of(4096, groups=1, batch=1, size=size, heads=heads)
    rounded = replace(call, **{n: getattr(call, n).bfloat16() for n in TENSORS})
    with torch.no_grad():
        out, state = run(mixer, rounded, list(range(tokens, 4097, tokens)))
        exact = mixer(replace(rounded, **{n: getattr(rounded, n).float() for n in TENSORS}))
    assert out.dtype == torch.bfloat16 and (state.memory is None or state.memory.dtype == torch.float32)
    return out.float(), exact


@pytest.mark.parametrize("name", ["window_linear", "gated_delta", "mamba2", "gsa", "mala", "performer"])
def test_bf16_stays_near_over_4096_steps(name):
    assert_near(*bf16_run(name, 64), BF16)


def test_window_is_attention_under_its_mask():
    """Against transformers' own arithmetic: softmax over sinks and the last W tokens."""
    call, mixer = call_of(40), mixer_of("window")
    t, j = torch.arange(40)[:, None], torch.arange(40)[None]
    mask = (j <= t) & ((j > t - W) | (j < N))
    q = call.q_BTGRK.flatten(2, 3).transpose(1, 2)
    k, v = (x.repeat_interleave(3, 2).transpose(1, 2) for x in (call.k_BTGK, call.v_BTGV))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=call.scale).transpose(1, 2)
    assert_near(mixer(call).flatten(2, 3), wanted, MIXER)
