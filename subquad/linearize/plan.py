"""The plan: which layer and which key/value head becomes which mixer. A value: printable, JSON both ways, needs no weights.

Key: G key/value heads, R query heads per key/value head, K key size, V value size, W window, N sinks.
"""

import importlib
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from subquad.errors import UserError, raise_all
from subquad.linearize.mixers import build, mixer_class, pieces
from subquad.linearize.mixers.base import HeadShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The smallest that each number may be; a window that is in use holds a token.
LEAST = dict(index=0, hidden=1, kv_heads=1, groups=1, key=1, value=1, teacher_window=1, cached=0, window=0, sinks=0)
_AGAIN = "Plans are written by subquad.plan: make it again, or save or download the student again."


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer. mixer None: it stays as the teacher has it (`kind`), for the reason in `why`."""

    index: int
    name: str  # module path in the model
    hidden: int
    kv_heads: int
    groups: int
    key: int
    value: int
    kind: str = "full_attention"
    teacher_window: int | None = None
    cached: int = (
        0  # numbers per token that the teacher's cache keeps, where that is not kv_heads x (key + value): latent attention keeps less
    )
    mixer: str | None = None
    exact: tuple[int, ...] = ()  # key/value heads that stay exact in a converted layer
    window: int = 0
    sinks: int = 0
    why: str = ""

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def soft_heads(self) -> int:
        """Key/value heads that are converted."""
        return 0 if self.mixer is None else self.kv_heads - len(self.exact)

    @property
    def soft_shape(self) -> HeadShape:
        return HeadShape(self.hidden, self.soft_heads, self.groups, self.key, self.value)

    def teacher_bytes(self, tokens: int, number: int) -> int:
        """Key/value bytes of this layer in the teacher; `number` bytes per number."""
        kept = tokens if self.teacher_window is None else min(tokens, max(self.teacher_window - 1, 1))
        return kept * (self.cached or self.kv_heads * (self.key + self.value)) * number

    def student_bytes(self, tokens: int, number: int, options: dict[str, Any]) -> int:
        """Exact heads' keys and values, window, sinks and recurrent state (fp32) of this layer in the student."""
        if self.mixer is None:
            return self.teacher_bytes(tokens, number)
        merged, cls = pieces(self.mixer, options), mixer_class(self.mixer)
        slots, sinks = cls.kept_tokens(tokens, self.window, self.sinks, **merged)
        exact = tokens * len(self.exact) * (self.key + self.value) * number
        local = (slots + sinks) * self.soft_heads * (self.key + self.value) * number
        extra = slots * self.soft_heads * cls.extra_size(self.soft_shape, **merged) * 4
        return exact + local + extra + cls.memory_bytes(self.soft_shape, **merged)


@dataclass(frozen=True)
class Plan:
    """What `subquad.linearize` carries out. `layers` holds every attention layer of the model, converted or not."""

    layers: tuple[LayerPlan, ...]
    mixer: str
    window: int
    sinks: int
    options: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""
    dtype: str = "float32"  # of keys and values in the cache

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.mixer is not None)

    @property
    def number(self) -> int:
        return BYTES.get(self.dtype, 4)

    def teacher_bytes(self, tokens: int) -> int:
        """Key/value bytes per sequence of `tokens` tokens in the teacher (its own recurrent layers, which stay, are not counted)."""
        return sum(layer.teacher_bytes(tokens, self.number) for layer in self.layers)

    def student_bytes(self, tokens: int) -> int:
        """Key/value and state bytes per sequence of `tokens` tokens in the student."""
        return sum(layer.student_bytes(tokens, self.number, self.options) for layer in self.layers)

    def parameters_added(self) -> int:
        """Numbers in the new modules."""
        with torch.device("meta"):
            mixers = [build(layer.mixer, layer.soft_shape, layer.window, layer.sinks, self.options) for layer in self.converted]
        return sum(p.numel() for m in mixers for p in m.parameters())

    def render(self, console) -> None:
        """Print the plan as tables on a rich console."""
        importlib.import_module("subquad.linearize.plan_table").render(self, console)

    def summary(self) -> dict[str, Any]:
        """What `render` prints, as JSON values."""
        return importlib.import_module("subquad.linearize.plan_table").summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal plan back."""
        data = asdict(self)
        data["layers"] = [{k: list(v) if isinstance(v, tuple) else v for k, v in layer.items()} for layer in data["layers"]]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """Read a plan; names in it are looked up in our tables only. UserError for keys or mixers this version does not know, and, all at once, for
        values of another type or out of range."""
        try:
            layers = tuple(LayerPlan(**{**layer, "exact": tuple(layer["exact"])}) for layer in data["layers"])
            plan = cls(**{**data, "layers": layers})
        except (TypeError, KeyError) as error:
            raise UserError(f"This plan does not fit this version of subquad ({error}); it was written by another one.") from error
        problems = _wrong_values(plan, "plan")
        for i, layer in enumerate(layers):
            problems += _wrong_values(layer, f"plan.layers.{i}") + _wrong_heads(layer, f"plan.layers.{i}")
        problems += _wrong_mixers(plan, shapes=not problems)
        raise_all([*problems, _AGAIN] if problems else [])
        return plan


def _wrong_values(row: LayerPlan | Plan, where: str) -> list[str]:
    """Values of another type, and numbers below their least."""
    problems, least = [], LEAST | ({} if row.mixer is None else {"window": 1})
    for name, kind, value in ((f.name, f.type, getattr(row, f.name)) for f in fields(row)):
        kind = kind if isinstance(kind, types.UnionType) else typing.get_origin(kind) or kind
        if isinstance(value, bool) or not isinstance(value, kind):
            problems.append(f"{where}.{name}: got {value!r}, expected {kind if isinstance(kind, types.UnionType) else kind.__name__}.")
        elif isinstance(value, int) and value < least[name]:
            problems.append(f"{where}.{name}: got {value}, allowed: {least[name]} or more.")
    return problems


def _wrong_heads(layer: LayerPlan, where: str) -> list[str]:
    heads = range(layer.kv_heads if isinstance(layer.kv_heads, int) else 0)
    if all(type(g) is int and g in heads for g in layer.exact) and len({*layer.exact}) == len(layer.exact) < max(len(heads), 1):
        return []
    return [f"{where}.exact: got {[*layer.exact]}, allowed: key/value heads of 0..{len(heads) - 1}, each once and not all of them."]


def _wrong_mixers(plan: Plan, shapes: bool) -> list[str]:
    """Mixers and options that this version does not know, or that the heads (where their shapes are numbers) cannot have."""
    problems: list[str] = []
    names = [name for name in (plan.mixer, *(layer.mixer for layer in plan.converted)) if isinstance(name, str)]
    for name in dict.fromkeys(names) if isinstance(plan.options, dict) else ():
        try:
            merged, cls = pieces(name, plan.options), mixer_class(name)
            layers = [layer for layer in plan.converted if layer.mixer == name and shapes]
            problems += {cls.misfit(layer.soft_shape, **merged) for layer in layers} - {""}
        except UserError as error:
            problems += error.problems
    return problems
