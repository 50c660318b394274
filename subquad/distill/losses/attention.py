"""Losses on one layer's attention output.

Key: B batch, T tokens, H query heads, V value head size.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def attention_output(mixed_BTHV: Tensor, exact_BTHV: Tensor, padding_BT: Tensor | None = None) -> Tensor:
    """Squared error relative to the exact output's mean square: 0 is equal, 1 is what an output of zeros would score. fp32 scalar.

    Dividing by the layer's own scale makes one learning rate and one clip fit every layer (mean squares differ by 1000 x over depth).
    padding_BT: 1 or True where a token is real, as in transformers' attention_mask; other tokens do not count. Every data parallel process must
    call it: the scale is that of all their tokens, so that the mean of the processes' losses is the loss of the whole batch, and of gradients too.
    """
    exact = exact_BTHV.detach().float()
    error_BT = (mixed_BTHV.float() - exact).square().mean(dim=(-1, -2))
    scale_BT = exact.square().mean(dim=(-1, -2))
    if padding_BT is not None:
        real = padding_BT.to(error_BT.dtype)
        error_BT, scale_BT = error_BT * real, scale_BT * real
    return error_BT.sum() / _mean_over_processes(scale_BT.sum()).clamp_min(torch.finfo(torch.float32).tiny)


def _mean_over_processes(x: Tensor) -> Tensor:
    """`x` itself where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    dist.all_reduce(x)
    return x / dist.get_world_size()
