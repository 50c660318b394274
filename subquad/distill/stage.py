"""A stage as data: what moves, where the student's inputs come from, what is compared, for how many tokens. Checked before any run."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from subquad.distill.losses import ATTENTION_LOSSES, LOSSES
from subquad.errors import raise_all
from subquad.registry import nearest

_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kKmMbB]?)")
_FACTOR = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: Any) -> Any:
    """20000, '20_000', '20k', '1.5M' -> int (k = 1,000). Anything else raises ValueError that says what is allowed."""
    if isinstance(value, bool):
        raise ValueError(f"expected a whole number such as 20000, 20k or 1M, got {value}")
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value.strip())
    count = float(match[1].replace("_", "")) * _FACTOR[match[2].lower()] if match else 0.5
    if count != int(count):
        raise ValueError(f"expected a whole number such as 20000, 20k or 1M, got {value!r}")
    return int(count)


def _no_bool(value: Any) -> Any:
    """YAML's `yes`, `on`, `true` must not pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]  # layer and head numbers, seeds: 0 is allowed
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Lora(BaseModel):
    """Low-rank adapters on the attention projections (or on every linear layer). Merged into the weights when the stage ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "all"] = "attention"


class Stage(BaseModel):
    """One training phase. Raises pydantic's ValidationError, with every wrong combination in one message, a line each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # also the name of its checkpoint folder
    train: Literal["mixers", "lora", "attention", "all"]
    inputs: Literal["teacher", "own"]  # of each layer: the teacher's hidden states (layer-local), or what the student itself computes
    losses: Annotated[dict[str, Positive], Field(min_length=1)]  # name -> weight
    tokens: Count
    context: Count = 512
    batch: Count = 1  # sequences per optimiser step, over all processes
    lr: Positive
    warmup: Annotated[Share, Field(lt=1)] = 0.05  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Share = 0.1  # share of lr at the last step
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0  # on matrices only
    clip: Positive = 1.0  # norm of the whole gradient
    betas: tuple[Annotated[Share, Field(lt=1)], Annotated[Share, Field(lt=1)]] = (0.9, 0.95)
    repeat: Share = 0.0  # share of the sequences that are one passage of context/2 tokens twice
    temperature: Positive = 1.0  # of the kl loss
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16: matrix products in bf16 by autocast; weights, states and losses stay fp32
    lora: Lora = Lora()

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, losses: dict[str, float]) -> dict[str, float]:
        unknown = [name for name in losses if name not in LOSSES]
        raise_all([f"no loss is called {name!r}.{nearest(name, LOSSES)} Known: {', '.join(LOSSES)}." for name in unknown])
        return losses

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        raise_all(list(self._problems()))
        return self

    def _problems(self):
        local = [name for name in self.losses if name in ATTENTION_LOSSES]
        deep = [name for name in self.losses if name not in ATTENTION_LOSSES]
        if self.inputs == "teacher" and deep:
            yield f"inputs: teacher compares layer by layer, so {', '.join(deep)} cannot be used. Use attention_output, or inputs: own."
        if self.inputs == "teacher" and self.train != "mixers":
            yield f"inputs: teacher trains mixers only, got train: {self.train}. Use train: mixers, or inputs: own with kl."
        if self.inputs == "own" and local:
            yield f"{', '.join(local)} compares with the teacher's own inputs. Use inputs: teacher, or the losses kl and cross_entropy."
        if self.tokens < self.context * self.batch:
            yield f"tokens: {self.tokens} is less than one step of batch x context = {self.batch} x {self.context}. Raise tokens."
        if self.context < 2:
            yield "context: 1 leaves no next token. Use at least 2."
        if self.repeat and self.context % 2:
            yield f"repeat puts a passage of half the context twice, so context must be even, got {self.context}."
        if self.temperature != 1.0 and "kl" not in self.losses:
            yield "temperature is used by the loss kl, which this stage does not have. Leave it out."
        if self.lora != Lora() and self.train != "lora":
            yield f"lora: settings are given, but train: {self.train} adds no adapters. Leave them out, or use train: lora."
        if self.final_lr != Stage.model_fields["final_lr"].default and self.schedule == "constant":
            yield "final_lr has no meaning with schedule: constant. Leave it out."

    def unfit(self, dtypes: set[str]) -> list[str]:
        """What is wrong with training parameters of these dtypes ("float32", ...); no dtype: there are none."""
        if not dtypes:
            return [f"Stage {self.name} (train: {self.train}) has nothing to train here. Train something else, or leave it out."]
        if not (small := dtypes - {"float32", "float64"}):
            return []
        return [
            f"Stage {self.name} would train weights kept as {', '.join(sorted(small))}, which rounds small updates away. "
            "Load the teacher with dtype float32 (accelerate launch --mixed_precision bf16 keeps it fast on a GPU)."
        ]

    @property
    def steps(self) -> int:
        """Optimiser steps: as many whole batches as fit into `tokens`."""
        return self.tokens // (self.context * self.batch)

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up to lr, then the schedule down to final_lr x lr at the last step."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step + 1 - warm) / max(1, self.steps - warm)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.schedule]
        floor = 0.0 if self.schedule == "constant" else self.final_lr
        return self.lr * (floor + (1 - floor) * left)
