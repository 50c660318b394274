"""Which tokens of a call are real, and how to bring them to the front of each row.

Mixers only ever see rows whose real tokens come first, followed by filler. Left padding, right padding, holes and packed documents are
all turned into that form by one gather and undone by one scatter, so that sinks are each row's first real tokens and the window counts
real tokens, whatever the batch looked like (DESIGN section 2).

Key: B batch, T tokens of this call, S tokens so far, D rows of the layout (B, or one per packed document), L tokens of the longest row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import UserError


@dataclass(frozen=True)
class Layout:
    """index_DL points into the B*T tokens of the call; real_DL says which of the row's places hold a real token."""

    index_DL: Tensor
    real_DL: Tensor
    fewest: int  # real tokens in the poorest row: a Python number, so that layers need not ask the device

    @property
    def counts_D(self) -> Tensor:
        return self.real_DL.sum(1)

    def gather(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [D, L, ...]; filler places hold some token's data and must be masked by `real_DL`."""
        return x_BT.flatten(0, 1)[self.index_DL]

    def scatter(self, x_DL: Tensor, B: int, T: int) -> Tensor:
        """[D, L, ...] -> [B, T, ...]; tokens that were not real become zeros."""
        flat = x_DL.new_zeros(B * T, *x_DL.shape[2:])
        return flat.index_put((self.index_DL[self.real_DL],), x_DL[self.real_DL]).unflatten(0, (B, T))


def padded(mask_BT: Tensor) -> Layout | None:
    """Layout of a call's part of the padding mask (1 real, 0 padding); None when every token is real."""
    real = mask_BT.bool()
    if bool(real.all()):
        return None
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    base = torch.arange(real.shape[0], device=real.device)[:, None] * real.shape[1]
    return Layout(order + base, real.gather(1, order), int(real.sum(1).min()))


def packed(position_ids_BT: Tensor, B: int) -> Layout | None:
    """One row per document when positions restart inside a row (transformers' packed format); None when they do not."""
    positions = position_ids_BT.expand(B, -1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] - positions[:, :-1] != 1
    if int(starts.sum()) == B:
        return None
    begin = starts.flatten().nonzero().flatten()
    end = torch.cat([begin[1:], begin.new_tensor([positions.numel()])])
    steps = torch.arange(int((end - begin).max()), device=positions.device)
    index = begin[:, None] + steps
    real = index < end[:, None]
    return Layout(index.clamp_max(positions.numel() - 1), real, 0)


class CallNote:
    """What the model-level call knew about its tokens; one object per model, overwritten by every outermost call.

    It is kept after the call because gradient checkpointing runs layers again during the backward pass.
    """

    def __init__(self):
        self.depth = 0
        self.mask_BS: Tensor | None = None
        self.position_ids: Tensor | None = None
        self._layouts: dict[tuple, Layout | None] = {}

    def enter(self, mask, position_ids) -> None:
        """Called on entering the model or one of its inner models; inner calls get masks the outer one may already have expanded."""
        if self.depth == 0:
            self.mask_BS = self.position_ids = None
            self._layouts = {}
        if isinstance(mask, Tensor) and mask.dim() != 2 and self.depth == 0:
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)}: converted layers take a 2-D padding mask [batch, tokens so far] (1 real, 0 padding), "
                "or restarting position_ids for packed documents. A 4-D mask cannot be honoured by a recurrent state."
            )
        if isinstance(mask, Tensor) and mask.dim() == 2 and self.mask_BS is None:
            self.mask_BS = mask
        if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and self.position_ids is None:
            self.position_ids = position_ids
        self.depth += 1

    def leave(self) -> None:
        self.depth = max(self.depth - 1, 0)

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
