"""The plan: which layer and which key/value head becomes which mixer. A value: printable, JSON both ways, needs no weights.

Key: G key/value heads, R query heads per key/value head, K key size, V value size, W window, N sinks.
"""

import importlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from subquad.errors import UserError
from subquad.linearize.mixers import build, mixer_class, pieces
from subquad.linearize.mixers.base import HeadShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
        """Read a plan; names in it are looked up in our tables only. UserError for keys or mixers this version does not know."""
        try:
            layers = tuple(LayerPlan(**{**layer, "exact": tuple(layer["exact"])}) for layer in data["layers"])
            plan = cls(**{**data, "layers": layers})
        except (TypeError, KeyError) as error:
            raise UserError(f"This plan does not fit this version of subquad ({error}); it was written by another one.") from error
        for layer in plan.converted:
            pieces(layer.mixer, plan.options)
        return plan
