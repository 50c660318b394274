"""The seam: the one place where a mixer is put into a transformers model.

Since transformers v5 an attention module projects, norms and rotates q, k, v itself and then calls
`ALL_ATTENTION_FUNCTIONS[config._attn_implementation](module, q, k, v, mask, scaling=...)`. A converted module gets its own shallow copy of
the config whose implementation is `subquad`; everything else in the model, its masks included, keeps the implementation it had.

Key: B batch, T tokens of this call, S tokens so far, H query heads, G key/value heads, R = H / G, K key size, V value size, D model size.
"""

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from subquad.errors import UserError
from subquad.linearize.calls import CallNote, Mode, Root
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.state import MixerState, state_of

IMPLEMENTATION = "subquad"

# Arguments at the seam that change the result and that mixers honour.
HONOURED = {"scaling", "softcap", "s_aux", "sliding_window"}
# Arguments that say nothing about the weights of one token for another.
HARMLESS = {
    "position_ids",
    "cache_position",
    "dropout",
    "is_causal",
    "position_embeddings",
    "hidden_states",
    "num_items_in_batch",
    "token_type_ids",
}
# Arguments that change the result and that a mixer cannot honour: refused by name whatever their value.
REFUSED = {"position_bias", "alibi", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "block_mask", "score_mod"}


@dataclass
class LayerInput:
    """What a converted layer is called with besides queries, keys and values."""

    hidden: Tensor | None = None  # [B, T, D]
    rotation: tuple[Tensor, Tensor] | None = None  # cos, sin
    state: MixerState | None = None


class LayerSeam:
    """What one converted attention module needs at the seam. A plain object, so that nothing of it lands in the state dict."""

    def __init__(self, module: nn.Module, index: int, exact: tuple[int, ...], kv_heads: int, root: Root, teacher_window: int | None):
        self.module, self.index, self.exact, self.root, self.teacher_window = module, index, exact, root, teacher_window
        self.soft = tuple(g for g in range(kv_heads) if g not in exact)
        order = [*self.exact, *self.soft]
        self.inverse = [order.index(g) for g in range(kv_heads)]
        self.config = module.config
        self._inputs: dict[int, LayerInput] = {}  # of calls under way, by thread: a server may call one model from several

    @property
    def input(self) -> LayerInput:
        return self._inputs.get(threading.get_ident()) or LayerInput()

    def attach(self) -> None:
        own = copy.copy(self.config)
        own.__dict__["_attn_implementation_internal"] = IMPLEMENTATION  # the setter would write through to shared sub-configs
        self.module.config = own
        self.module.seam = self
        self.handles = [
            self.module.register_forward_pre_hook(self.before, with_kwargs=True),
            self.module.register_forward_hook(self.after, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.module.config = self.config
        del self.module.seam

    def before(self, module, args, kwargs) -> None:
        """Note this call's layer input and put our state into its cache."""
        values = [*args, *kwargs.values()]
        hidden = next((x for x in values if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point()), None)
        cache = next((x for x in values if isinstance(x, Cache)), None)
        pairs = (
            x for x in values if isinstance(x, tuple) and len(x) == 2 and all(isinstance(y, Tensor) and y.is_floating_point() for y in x)
        )
        state = None
        if cache is not None and self.root.note.mode.name == "student":
            state = state_of(cache, self.index, self.teacher_window)
            state.updated = False
        self._inputs[threading.get_ident()] = LayerInput(hidden, next(pairs, None), state)

    def after(self, module, args, output) -> None:
        self._inputs.pop(threading.get_ident(), None)


def seams(model: nn.Module) -> list[LayerSeam]:
    """The converted layers of a model, in layer order. Empty for a model that is not converted."""
    found = {id(s): s for m in model.modules() if (s := m.__dict__.get("seam")) is not None}
    return sorted(found.values(), key=lambda s: s.index)


class _HeadView:
    """An attention module as seen by the exact heads alone: per-head tensors (learned sinks, slopes) are cut to those heads."""

    def __init__(self, module: nn.Module, heads: list[int], total: int):
        self.__dict__.update(_module=module, _heads=heads, _total=total)

    def __getattr__(self, name):
        value = getattr(self._module, name)
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == self._total:
            return value[self._heads]
        return value


def _original(seam: LayerSeam) -> Callable:
    """The attention function the module would have called. `eager` is not in the table: it lives beside the module's class."""
    name = seam.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        for cls in type(seam.module).__mro__:
            eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if eager is not None:
                return eager
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, None)


def exact_attention(seam: LayerSeam, q: Tensor, k: Tensor, v: Tensor, mask, kv_heads: tuple[int, ...], **kwargs) -> Tensor:
    """The teacher's own attention for some key/value heads: q [B, H', T, K] -> [B, T, H', V]."""
    total, groups = seam.module.mixer.total_kv_heads, seam.module.mixer.shape.groups
    module = seam.module
    if len(kv_heads) != total:
        heads = [g * groups + r for g in kv_heads for r in range(groups)]
        module = _HeadView(seam.module, heads, total * groups)
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == total * groups:
            mask = mask[:, heads]
        if isinstance(kwargs.get("s_aux"), Tensor):
            kwargs["s_aux"] = kwargs["s_aux"][heads]
    return _original(seam)(module, q, k, v, mask, **kwargs)[0]


def _check(seam: LayerSeam, kwargs: dict) -> None:
    given = [name for name, value in kwargs.items() if value is not None]
    problems = [name for name in given if name in REFUSED]
    problems += [
        name for name in given
        if name not in HONOURED | HARMLESS | REFUSED and isinstance(kwargs[name], Tensor)
    ]  # fmt: skip
    if kwargs.get("dropout") and seam.module.training:
        raise UserError(
            f"Layer {seam.index} ({type(seam.module).__name__}) trains with attention dropout {kwargs['dropout']:g}, which a mixer does not have: "
            "set the config's attention dropout to 0 (or call model.eval()) before training a converted model."
        )
    if problems:
        raise UserError(
            f"Layer {seam.index} ({type(seam.module).__name__}) passes {', '.join(problems)} to its attention. That changes the result and a mixer "
            f"cannot honour it (honoured: {', '.join(sorted(HONOURED))}). Keep this layer exact in the plan."
        )


def _check_sizes(seam: LayerSeam, query: Tensor, key: Tensor, value: Tensor) -> None:
    """A student's config.json may have been edited, and some mixers would run with other heads than the model's."""
    total, shape = seam.module.mixer.total_kv_heads, seam.module.mixer.shape
    planned = (total * shape.groups, total, shape.key, shape.value)
    if planned != (has := (query.shape[1], key.shape[1], key.shape[3], value.shape[3])):
        raise UserError(
            f"Layer {seam.index} ({type(seam.module).__name__}): (query heads, key/value heads, key size, value size) are {planned} in the plan "
            f"and {has} in the model. Save or download the student again."
        )


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **kwargs) -> tuple[Tensor, None]:
    """The registered attention function: q [B, H, T, K], k [B, G, T, K], v [B, G, T, V] -> o [B, T, H, V]."""
    seam: LayerSeam = module.seam
    note = seam.root.note
    every = tuple(range(module.mixer.total_kv_heads))
    _check_sizes(seam, query, key, value)
    if note.mode.name != "student":
        exact = exact_attention(seam, query, key, value, attention_mask, every, **kwargs)
        if note.mode.name == "teacher":
            return exact, None
        _check(seam, kwargs)
        mode = {"transfer": _transfer, "gated": _gated}[note.mode.name]
        return mode(seam, note, query, key, value, exact, kwargs), None
    _check(seam, kwargs)
    state = seam.input.state
    if state is not None and not state.updated:
        raise UserError(
            f"Layer {seam.index} ({type(module).__name__}) attends without adding to its own cache layer (it shares keys with another layer). Keep it exact."
        )
    q, k, v = (_heads(x, seam.soft, len(every)) for x in (query, key, value))
    mixed = run_mixer(seam, note, q, k, v, state, kwargs)
    if state is not None:
        state.length += query.shape[2]
    if not seam.exact:
        return mixed, None
    q, k, v = (_heads(x, seam.exact, len(every)) for x in (query, key, value))
    if state is not None:
        k, v = state.extend_exact(k, v)
    exact = exact_attention(seam, q, k, v, attention_mask, seam.exact, **kwargs)
    both = torch.cat([exact.unflatten(2, (len(seam.exact), -1)), mixed.to(exact.dtype).unflatten(2, (len(seam.soft), -1))], 2)
    return both[:, :, seam.inverse].flatten(2, 3), None


def _heads(x: Tensor, kv_heads: tuple[int, ...], total: int) -> Tensor:
    """Rows of [B, P, T, K] that belong to `kv_heads`; P is G or H."""
    if len(kv_heads) == total:
        return x
    return x.unflatten(1, (total, -1))[:, list(kv_heads)].flatten(1, 2)


def run_mixer(
    seam: LayerSeam,
    note: CallNote,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MixerState | None,
    kwargs: dict,
    mixer=None,
    heads: tuple[int, ...] | None = None,
    exact: Tensor | None = None,
) -> Tensor:
    """Bring the call into the mixer's form, run it, and bring the output back: [B, T, H, V]."""
    mixer = seam.module.mixer if mixer is None else mixer
    heads = seam.soft if heads is None else heads
    B, _, T, _ = q.shape
    G = len(heads)
    hidden = seam.input.hidden
    if hidden is None or hidden.shape[:2] != (B, T):
        raise UserError(
            f"Layer {seam.index} ({type(seam.module).__name__}) was called without its hidden states [batch, tokens, size]; it cannot be converted."
        )
    s_aux = kwargs.get("s_aux")
    if s_aux is not None:
        s_aux = s_aux.unflatten(0, (seam.module.mixer.total_kv_heads, -1))[list(heads)]
    scale = kwargs.get("scaling")
    call = AttentionCall(
        q_BTGRK=q.transpose(1, 2).unflatten(2, (G, -1)), k_BTGK=k.transpose(1, 2), v_BTGV=v.transpose(1, 2), hidden_BTD=hidden,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, state=state, softcap=kwargs.get("softcap"), sink_logit_GR=s_aux, fewest=T,
    )  # fmt: skip
    call.causal = is_causal(seam.module)
    if note.mode.calibrating:
        call.calibrating, call.reach, call.exact_BTGRV = True, kwargs.get("sliding_window"), exact.unflatten(2, (G, -1))
    if mixer.plain and seam.input.rotation is not None:
        plain_q, plain_k = unrotated(seam, q, k)
        call.plain_q_BTGRK, call.plain_k_BTGK = plain_q.transpose(1, 2).unflatten(2, (G, -1)), plain_k.transpose(1, 2)
    layout = note.layout(B, T, cached=state is not None)
    if layout is not None:
        for name in ("q_BTGRK", "k_BTGK", "v_BTGV", "hidden_BTD", "plain_q_BTGRK", "plain_k_BTGK", "exact_BTGRV"):
            x = getattr(call, name)
            setattr(call, name, None if x is None else layout.gather(x))
        call.real_BT, call.fewest = layout.real_DL, layout.fewest
    with torch.autocast(q.device.type, enabled=False):  # states and normalisers are fp32 whatever the model is trained in
        out = mixer(call)
    if layout is not None:
        out = layout.scatter(out, B, T)
    return out.flatten(2, 3).contiguous()  # as transformers' own functions return it: some modules call .view on it


def is_causal(module: nn.Module) -> bool:
    """Attention modules say so themselves; those that say nothing are decoders'."""
    return bool(getattr(module, "is_causal", True))


def unrotated(seam: LayerSeam, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, P, T, K] before the family's rotary embedding: its own function with the angle turned round. UserError where it has none."""
    cos, sin = seam.input.rotation
    modules = (sys.modules.get(cls.__module__) for cls in type(seam.module).__mro__)
    rotate = next((f for m in modules if (f := getattr(m, "apply_rotary_pos_emb", None)) is not None), None)
    size = cos.shape[-1]
    if rotate is None or size > q.shape[-1] or size % 2:
        raise UserError(
            f"Layer {seam.index} ({type(seam.module).__name__}) rotates queries and keys in a way that cannot be undone here. "
            "Use a mixer with position keep (subquad mixers NAME says which one it has)."
        )
    stretch = (cos.square() + sin.square()).mean()  # 1, or the square of a scale that some long-context variants put on top
    parts = rotate(q[..., :size], k[..., :size], cos, -sin)
    return tuple(torch.cat([part / stretch.to(x.dtype), x[..., size:]], -1) for part, x in zip(parts, (q, k), strict=True))


def _transfer(seam: LayerSeam, note: CallNote, q, k, v, exact, kwargs) -> Tensor:
    """Hand the mixer's and the teacher's output of the converted heads to the caller; the exact output goes on."""
    total = seam.module.mixer.total_kv_heads
    q, k, v = (_heads(x, seam.soft, total).detach() for x in (q, k, v))
    own = seam.input
    own.hidden = None if own.hidden is None else own.hidden.detach()
    with torch.enable_grad():
        target = exact.detach().unflatten(2, (total, -1))[:, :, list(seam.soft)].flatten(2, 3)
        mixed = run_mixer(seam, note, q, k, v, None, kwargs, exact=target)
        note.mode.on_layer(seam.index, mixed, target, note.padding(q.shape[0], q.shape[2]))
    return exact


def _gated(seam: LayerSeam, note: CallNote, q, k, v, exact, kwargs) -> Tensor:
    """gate x exact + (1 - gate) x window, per key/value head: how much of each head's full attention the model needs (DESIGN section 3)."""
    total = seam.module.mixer.total_kv_heads
    window = run_mixer(seam, note, q, k, v, None, kwargs, mixer=note.mode.windows[seam.index], heads=tuple(range(total)))
    gate = note.mode.gates[seam.index].to(exact.dtype)[None, None, :, None, None]
    exact, window = exact.unflatten(2, (total, -1)), window.unflatten(2, (total, -1))
    return torch.lerp(window, exact, gate.expand_as(exact)).flatten(2, 3)


@contextmanager
def mode(model: nn.Module, name: str, **fields):
    """Switch every converted layer of a model to another mode, for calls of the model within the length of a with block."""
    found = seams(model)
    if not found:
        raise UserError("This model has no converted layers: call subquad.linearize(model, plan) first.")
    root = found[0].root
    before, root.mode = root.mode, Mode(name, **fields)
    try:
        yield model
    finally:
        root.mode = before


AttentionInterface.register(IMPLEMENTATION, attention)
