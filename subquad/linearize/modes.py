"""Other ways to run a converted model for the length of a `with` block: as its own teacher, layer-local transfer, gated selection.

Key: B batch, T tokens, G key/value heads, H query heads, V value size.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from subquad.linearize.mixers.window import Window
from subquad.linearize.seam import mode, seams


def as_teacher(model: nn.Module):
    """Inside the block every layer runs the teacher's exact attention with the model's present weights. Caches are stock ones."""
    return mode(model, "teacher")


def transfer(model: nn.Module, on_layer: Callable[[int, Tensor, Tensor, Tensor | None], None]):
    """Inside the block every converted layer passes the exact output on and calls on_layer(index, mixed, exact, padding) (SEEDS G02).

    mixed, exact: [B, T, H', V] of the converted heads; gradients of `mixed` reach the mixer's parameters only. padding: [B, T] bool of real tokens,
    or None. Run the model under torch.no_grad().
    """
    return mode(model, "transfer", on_layer=on_layer)


def calibrate(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor | None = None) -> None:
    """Start values that depend on text, set from one teacher pass over ids_BT [B, T], in place: shares, maps, decays (mixers/calibration.py).

    mask_BT: 1 where a token is real. Mixers without such values, and those trained already, stay as they are.
    """
    with torch.no_grad(), mode(model, "transfer", on_layer=lambda *_: None, calibrating=True):
        model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)


def gated(model: nn.Module, gates: dict[int, Tensor]):
    """Inside the block head g of layer l gives gates[l][g] x exact + (1 - gates[l][g]) x (the plan's window with sinks); gates: [G] per layer."""
    mixers = {seam.index: seam.module.mixer for seam in seams(model)}
    windows = {index: Window(mixer.shape, mixer.window, mixer.sinks) for index, mixer in mixers.items()}
    return mode(model, "gated", gates=gates, windows=windows)
