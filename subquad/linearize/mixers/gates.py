"""Gates: small linear maps of the layer input, one output per head or per feature, computed in fp32.

Key: B batch, T tokens, D model size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# SEEDS 0.11: without damping, converted models forget too fast at step 0. GLA divides log sigmoid by 16.
DAMPING = 16.0


class InputGate(nn.Module):
    """x -> W x + b with zero weight: at the start the gate is the same for every token, `bias`.

    [B, T, D] -> [B, T, *shape], fp32. The layer input is normalised first (RMS over D, no parameters): what reaches an attention module is
    already normed in pre-norm models but not in post-norm ones, and gates should start alike in both.
    """

    def __init__(self, hidden: int, shape: tuple[int, ...], bias: float, rank: int | None = None):
        super().__init__()
        size = 1
        for s in shape:
            size *= s
        self.shape = shape
        self.down = None if rank is None else nn.Parameter(torch.randn(hidden, rank) / hidden**0.5)
        self.weight = nn.Parameter(torch.zeros(rank or hidden, size))
        self.bias = nn.Parameter(torch.full((size,), float(bias)))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        x = F.rms_norm(hidden_BTD.float(), hidden_BTD.shape[-1:], eps=1e-6)
        if self.down is not None:
            x = x @ self.down.float()
        return (x @ self.weight.float() + self.bias.float()).unflatten(-1, self.shape)


def log_decay(logit: Tensor) -> Tensor:
    """log sigmoid(logit) / 16 <= 0, fp32."""
    return F.logsigmoid(logit) / DAMPING
