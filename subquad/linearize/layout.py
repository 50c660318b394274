"""Which tokens of a call are real, and how to bring them to the front of each row.

Mixers only ever see rows whose real tokens come first, followed by filler. Left padding, right padding, holes and packed documents are
all turned into that form by one gather and undone by one scatter, so that sinks are each row's first real tokens and the window counts
real tokens, whatever the batch looked like (DESIGN section 2).

Key: B batch, T tokens of this call, S tokens so far, D rows of the layout (B, or one per packed document), L tokens of the longest row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
