"""What one training step computes: `objective(batch_BT, backward) -> numbers to log`; it calls `backward(loss)` once or more.

What the student is made of stays unknown here: `transfer` and `as_teacher` are context managers that the caller passes in.

Key: B batch, T tokens, H query heads, V value head size, N = B*T, D hidden size, L converted layers.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.distill.log import LAYER
from subquad.distill.lora import adapters_off
from subquad.distill.losses import ATTENTION_LOSSES, IGNORE, LOGIT_LOSSES, NEEDS_TEACHER
from subquad.distill.losses.head import CHUNK, Head, losses_from_hidden, losses_from_logits
from subquad.registry import lookup

Objective = Callable[[Tensor, Callable[[Tensor], None]], dict[str, float]]
Teacher = Callable[[], AbstractContextManager[nn.Module]]


def transfer_objective(
    model: nn.Module,
    transfer: Callable[[nn.Module, Callable], AbstractContextManager],
    losses: Mapping[str, float],
) -> Objective:
    """Layer-local: one teacher forward; each converted layer's mixer is compared with the exact output, and nothing else moves.

    `transfer(model, on_layer)`: a context in which a forward pass calls on_layer(index, mixed_BTHV, exact_BTHV, padding_BT | None) per
    converted layer and passes the exact output on. Each layer goes backward inside its call: memory holds the graph of one layer.
    The losses of the layers are summed for the gradient (they share no parameter) and averaged for the log, which also has each layer's own
    as `layer INDEX`: a layer that does not learn disappears in a mean of thirty.
    """
    functions = [(name, weight, lookup("loss", name, ATTENTION_LOSSES)) for name, weight in losses.items()]

    def objective(batch_BT: Tensor, backward: Callable[[Tensor], None]) -> dict[str, float]:
        layers: dict[int, Tensor] = {}

        def on_layer(index: int, mixed_BTHV: Tensor, exact_BTHV: Tensor, padding_BT: Tensor | None) -> None:
            with torch.enable_grad():
                values = [function(mixed_BTHV, exact_BTHV, padding_BT) for _, _, function in functions]
                backward(sum(weight * value for (_, weight, _), value in zip(functions, values, strict=True)))
            layers[index] = torch.stack([value.detach() for value in values])

        with torch.no_grad(), transfer(model, on_layer):
            model.base_model(input_ids=batch_BT, use_cache=False)
        assert layers, "the transfer pass reached no converted layer"
        each_LN = torch.stack(list(layers.values()))  # [layers, losses]
        weights_N = each_LN.new_tensor([weight for _, weight, _ in functions])
        means = each_LN.mean(0)
        return (
            {"loss": float(means @ weights_N)}
            | {name: mean for (name, _, _), mean in zip(functions, means.tolist(), strict=True)}
            | {f"{LAYER}{index}": value for index, value in zip(layers, (each_LN @ weights_N).tolist(), strict=True)}
        )

    return objective


def logits_objective(
    model: nn.Module,
    teacher: Teacher | None,
    losses: Mapping[str, float],
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Objective:
    """The student on its own inputs, compared with the teacher's next-token distribution, the next token, or both.

    `teacher()` is a context that yields the module to ask: `same_weights(...)` or `live_teacher(...)`; None when no loss needs one.
    """
    functions = {name: (weight, lookup("loss", name, LOGIT_LOSSES)) for name, weight in losses.items()}
    asks_teacher = any(name in NEEDS_TEACHER for name in losses)
    assert teacher is not None or not asks_teacher, f"the losses {', '.join(losses)} need a teacher"
    plain: list[bool] = []  # decided on the first batch: the weights are on their device then

    def objective(batch_BT: Tensor, backward: Callable[[Tensor], None]) -> dict[str, float]:
        labels_N = next_tokens(batch_BT).flatten()
        if not plain:
            with teacher() if asks_teacher else nullcontext(model) as asked, torch.autocast(batch_BT.device.type, enabled=False):
                plain.append(all(has_plain_head(module, batch_BT[:1, :8]) for module in {model, asked}))
        read = _hidden if plain[0] else _logits
        expected, expected_head = None, None
        if asks_teacher:
            with torch.no_grad(), teacher() as asked:
                expected, expected_head = read(asked, batch_BT)
        values, head = read(model, batch_BT)
        if plain[0]:
            total, means = losses_from_hidden(values, head, expected, expected_head, labels_N, functions, temperature, chunk)
        else:
            total, means = losses_from_logits(values, expected, labels_N, functions, temperature, chunk)
        backward(total)
        return {"loss": float(total.detach())} | {name: float(mean) for name, mean in means.items()}

    return objective


def same_weights(model: nn.Module, as_teacher: Callable[[nn.Module], AbstractContextManager]) -> Teacher:
    """The student as its own teacher: `as_teacher(model)` switches exact attention on, adapters are off. For train: mixers or lora."""

    @contextmanager
    def teacher():
        with as_teacher(model), adapters_off(model):
            yield model

    return teacher


def live_teacher(teacher: nn.Module) -> Teacher:
    """A second model that stays as it is. For train: attention or all, which move the weights the teacher would share."""
    teacher.requires_grad_(False).eval()
    return lambda: nullcontext(teacher)


def next_tokens(batch_BT: Tensor) -> Tensor:
    """Labels [B, T]: the token that follows; IGNORE at the last position. These are the positions every logit loss counts."""
    return F.pad(batch_BT[:, 1:], (0, 1), value=IGNORE)


def has_plain_head(model: Any, ids_1T: Tensor) -> bool:
    """True when logits are output_embeddings(base_model's last hidden state) and nothing more.

    Asked of the numbers, not of a list of families. The head's input is enlarged until logits reach 100 for the question, because a softcap
    or a scale that matters at 30 is invisible at the 0.1 of a small random model.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False
    with torch.no_grad():
        hidden = _hidden(model, ids_1T)[0]
        factor = 100 / head(hidden).abs().max().clamp_min(1e-6)
        expected = head(hidden * factor).float()
        handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:]))
        try:
            found = model(input_ids=ids_1T, use_cache=False).logits.flatten(0, 1).float()
        finally:
            handle.remove()
    tolerance = 1e-2 if head.weight.dtype == torch.float32 else 2.0  # of 100: fp32 sums in another order; bf16 keeps 8 bits
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance)


def _hidden(model: Any, ids_BT: Tensor) -> tuple[Tensor, Head]:
    """Last hidden states [N, D], and the head that reads them."""
    linear = model.get_output_embeddings()
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1), Head(linear.weight, linear.bias)


def _logits(model: Any, ids_BT: Tensor) -> tuple[Tensor, None]:
    """Whole logits [N, vocabulary]."""
    return model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1), None
