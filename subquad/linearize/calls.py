"""What one call of a model tells its converted layers: which tokens are real, and the mode it runs in.

Every call has a note of its own that nothing changes afterwards. Gradient checkpointing runs layers again in the backward pass, when the model
may have been called on other text or in another mode since: such a second run reads the note of its first.

Key: B batch, T tokens of this call, S tokens so far, G key/value heads.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.linearize.layout import Layout, packed, padded

# Attributes in which a module keeps the function that checkpoints it: transformers' layers, torch's CheckpointWrapper.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True)
class Mode:
    """How converted layers run (modes.py)."""

    name: str = "student"  # student | teacher | transfer | gated
    on_layer: Callable | None = None  # transfer: called with (layer index, mixed, exact, padding)
    calibrating: bool = False  # transfer: mixers set the start values that depend on text
    gates: Mapping[int, Tensor] | None = None  # gated: layer index -> [G]
    windows: Mapping[int, nn.Module] | None = None  # gated: layer index -> what a closed gate leaves


@dataclass(frozen=True, eq=False)
class CallNote:
    """What the model-level call knew about its tokens, and its mode."""

    mode: Mode = Mode()
    mask_BS: Tensor | None = None
    position_ids: Tensor | None = None
    _layouts: dict[tuple, Layout | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def outermost(cls, mode: Mode, mask, position_ids) -> "CallNote":
        """UserError for a mask that no recurrent state can honour."""
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)}: converted layers take a 2-D padding mask [batch, tokens so far] (1 real, 0 padding), "
                "or restarting position_ids for packed documents. A 4-D mask cannot be honoured by a recurrent state."
            )
        return cls(mode).inner(mask, position_ids)

    def inner(self, mask, position_ids) -> "CallNote":
        """The note of an inner model's call: what the outer one knew stands (its mask may have been expanded since), the rest is added."""
        found = {"mask_BS": mask, "position_ids": position_ids}
        new = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.dim() == 2 and getattr(self, name) is None}
        return replace(self, **new) if new else self

    def layout(self, B: int, T: int, cached: bool) -> Layout | None:
        """The layout of a layer call of B rows and T tokens, computed once per model call. None: every token real, one document a row."""
        key = (B, T, cached)
        if key not in self._layouts:
            self._layouts[key] = self._layout(B, T, cached)
        return self._layouts[key]

    def _layout(self, B: int, T: int, cached: bool) -> Layout | None:
        if self.mask_BS is not None:
            if self.mask_BS.shape[0] != B or self.mask_BS.shape[1] < T:
                raise UserError(
                    f"attention_mask has shape {tuple(self.mask_BS.shape)} but the call has {B} rows of {T} new tokens; give one column per token so far."
                )
            return padded(self.mask_BS[:, -T:])
        if self.position_ids is not None and self.position_ids.shape[-1] == T and not cached:
            return packed(self.position_ids, B)
        return None

    def padding(self, B: int, T: int) -> Tensor | None:
        """[B, T] bool of real tokens of this call, or None when all are real."""
        if self.mask_BS is None or self.mask_BS.shape[0] != B:
            return None
        mask = self.mask_BS[:, -T:].bool()
        return None if bool(mask.all()) else mask


class Root:
    """What all converted layers of one model share: the mode of calls to come, and the notes of those under way."""

    def __init__(self):
        self.mode = Mode()
        self._calls: dict[int, list[tuple[nn.Module | None, CallNote]]] = {}

    @property
    def calls(self) -> list[tuple[nn.Module | None, CallNote]]:
        """Model and note of the calls under way in this thread, outermost first: autograd has a thread for every device."""
        return self._calls.setdefault(threading.get_ident(), [])

    @property
    def note(self) -> CallNote:
        """Of the innermost call under way; a layer called on its own knows of no padding. UserError where that cannot be told."""
        if self.calls:
            return self.calls[-1][1]
        if torch._C._current_graph_task_id() != -1:
            raise UserError(
                "A converted layer is run again in the backward pass by a checkpoint that does not say of which call. Use model.activation_checkpointing_enable() "
                "or torch's checkpoint_wrapper in place of torch.utils.checkpoint around single layers, and call the model, not its layers."
            )
        return CallNote(self.mode)

    def enter(self, module: nn.Module, mask, position_ids) -> None:
        while any(each is module for each, _ in self.calls):
            self.calls.pop()  # left by a Ctrl-C, which forward hooks are not told of
        note = self.calls[-1][1].inner(mask, position_ids) if self.calls else CallNote.outermost(self.mode, mask, position_ids)
        self.calls.append((module, note))

    def leave(self, module: nn.Module) -> None:
        if self.calls and self.calls[-1][0] is module:  # not where entering was refused
            self.calls.pop()

    @contextmanager
    def again(self, note: CallNote) -> Iterator[None]:
        """Inside the block layers belong to the call of `note`."""
        calls = self.calls
        calls.append((None, note))
        try:
            yield
        finally:
            calls.pop()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint function whose second run of a layer reads the note of the first. An object, so that a copied model gets its own root."""

    root: Root
    function: Callable

    def __call__(self, layer: Callable, *args, **kwargs):
        note = self.root.note

        def run(*inputs, **more):
            with self.root.again(note):
                return layer(*inputs, **more)

        return self.function(run, *args, **kwargs)


class ModelHooks:
    """Notes padding at the call of the model and of every inner model (a base model may be called on its own)."""

    def __init__(self, model: nn.Module, root: Root):
        self.model, self.root, self.handles = model, root, []
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self.after, always_call=True))

    def before(self, module, args, kwargs) -> tuple[tuple, dict]:
        names = list(inspect.signature(module.forward).bind_partial(*args).arguments) if args else []
        given = dict(zip(names, args, strict=False)) | kwargs
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if not self.root.calls:
            self._remember()
            if positions is None and _uneven(mask) and self._counts(module):
                positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -_tokens(given) :]
                if "position_ids" in names:
                    args = tuple(positions if name == "position_ids" else x for name, x in zip(names, args, strict=True))
                else:
                    kwargs["position_ids"] = positions
        self.root.enter(module, mask, positions)
        return args, kwargs

    def _remember(self) -> None:
        """At every call that may be followed by a backward pass, since checkpointing can be switched on at any time."""
        if torch.is_grad_enabled():
            for module, name, function in self._checkpoints():
                if not isinstance(function, Checkpoint):
                    setattr(module, name, Checkpoint(self.root, function))

    def _checkpoints(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        return ((m, name, m.__dict__[name]) for m in self.model.modules() for name in CHECKPOINTS if name in m.__dict__)

    @staticmethod
    def _counts(module: nn.Module) -> bool:
        """Whether real tokens may be numbered from 0 in every row without the teacher's attention changing: rotary embedding, which is relative.

        A feature map of rotated keys is not relative: without this, padding on the left would change what a linear branch computes. `generate`
        numbers them itself; a plain forward call with a padding mask does not.
        """
        rotary = getattr(module.config.get_text_config(), "rope_parameters", None)
        plain = isinstance(rotary, dict) and "section" not in str(rotary)  # multimodal positions have three parts
        return plain and "position_ids" in inspect.signature(module.forward).parameters

    def after(self, module, args, output) -> None:
        self.root.leave(module)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, name, function in self._checkpoints():
            if isinstance(function, Checkpoint):
                setattr(module, name, function.function)


def _uneven(mask) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())


def _tokens(given: Mapping) -> int:
    """Tokens of a model-level call."""
    return next(x.shape[1] for x in (given.get("input_ids"), given.get("inputs_embeds")) if isinstance(x, Tensor))
