"""A student with a part of it taken away, for the length of a `with` block: what the part is worth is what the numbers lose.

Only passes without a cache are meaningful inside a block: a state made by one variant means nothing to another.

Key: B batch, T tokens, G key/value heads of a layer, R query heads each, V value size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.window import Window
from subquad.linearize.seam import LayerSeam, seams

EVERYTHING = 1 << 30  # a window that no text fills: exact softmax attention


class ByHead(nn.Module):
    """Several mixers side by side, each for some of a layer's key/value heads."""

    def __init__(self, parts: list[tuple[tuple[int, ...], nn.Module]], like: nn.Module):
        super().__init__()
        self.heads, self.mixers = [heads for heads, _ in parts], nn.ModuleList(mixer for _, mixer in parts)
        self.total_kv_heads, self.shape = like.total_kv_heads, like.shape
        self.plain = any(mixer.plain for mixer in self.mixers)

    def forward(self, call: AttentionCall) -> Tensor:
        outs, order = [], []
        for heads, mixer in zip(self.heads, self.mixers, strict=True):
            index = list(heads)
            outs.append(mixer(AttentionCall(
                q_BTGRK=call.q_BTGRK[:, :, index], k_BTGK=call.k_BTGK[:, :, index], v_BTGV=call.v_BTGV[:, :, index], hidden_BTD=call.hidden_BTD,
                scale=call.scale, real_BT=call.real_BT, fewest=call.fewest, softcap=call.softcap,
                sink_logit_GR=None if call.sink_logit_GR is None else call.sink_logit_GR[index],
                plain_q_BTGRK=None if call.plain_q_BTGRK is None else call.plain_q_BTGRK[:, :, index],
                plain_k_BTGK=None if call.plain_k_BTGK is None else call.plain_k_BTGK[:, :, index],
            )))  # fmt: skip
            order += index
        return torch.cat(outs, 2)[:, :, [order.index(g) for g in range(len(order))]]


@contextmanager
def swapped(seam: LayerSeam, mixer: nn.Module, every_head: bool = False) -> Iterator[None]:
    """One layer with another mixer; every_head: the mixer also computes the heads that were exact."""
    old, kept = seam.module.mixer, (seam.exact, seam.soft, seam.inverse)
    if mixer is not old:
        mixer.total_kv_heads = old.total_kv_heads
    seam.module.mixer = mixer
    if every_head:
        total = old.total_kv_heads
        seam.exact, seam.soft, seam.inverse = (), tuple(range(total)), list(range(total))
    try:
        yield
    finally:
        seam.module.mixer = old
        seam.exact, seam.soft, seam.inverse = kept


@contextmanager
def with_sizes(seam: LayerSeam, **sizes: int) -> Iterator[None]:
    """One layer's own mixer with another window or another number of sinks."""
    mixer = seam.module.mixer
    before = {name: getattr(mixer, name) for name in sizes}
    for name, value in sizes.items():
        setattr(mixer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(mixer, name, value)


def window_of(seam: LayerSeam, window: int | None = None, sinks: int | None = None) -> Window:
    """Softmax over the layer's window and sinks, for its converted heads."""
    mixer = seam.module.mixer
    return Window(mixer.shape, mixer.window if window is None else window, mixer.sinks if sinks is None else sinks)


def variants(model: PreTrainedModel, layers: list[int] | None = None) -> dict[str, object]:
    """name -> function that returns a context around `model` without that part. layers: those to restore to exact attention one at a time."""
    found = seams(model)
    linear = any(type(seam.module.mixer) is not Window for seam in found)

    def without(change, of: list[LayerSeam] = found):
        @contextmanager
        def opened():
            with ExitStack() as stack:
                for seam in of:
                    stack.enter_context(change(seam))
                yield model

        return opened

    def no_exact(seam: LayerSeam):
        own = seam.module.mixer
        return swapped(seam, ByHead([(seam.soft, own), (seam.exact, window_of(seam))], own), every_head=True)

    result: dict[str, object] = {}
    if linear:
        result["linear branch off"] = without(lambda seam: swapped(seam, window_of(seam)))
    result["window off"] = without(lambda seam: with_sizes(seam, window=1))
    if any(seam.module.mixer.sinks for seam in found):
        result["sinks off"] = without(lambda seam: with_sizes(seam, sinks=0))
    if exact := [seam for seam in found if seam.exact]:
        result["exact heads off"] = without(no_exact, exact)
    for seam in found:
        if layers is None or seam.index in layers:
            result[f"layer {seam.index} restored"] = without(lambda seam: swapped(seam, window_of(seam, window=EVERYTHING)), [seam])
    return result
