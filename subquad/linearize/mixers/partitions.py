"""Partitions: P copies of the state, of which a token writes and reads the `top` best (SEEDS 3.2 K11, B08).

    o_t = sum_p e_tp S^(p)_t^T q_t,  S^(p) gets e_jp k_j v_j^T,  e = softmax(W x) with all but the largest set to 0

The sum over partitions is a state over the products k_a e_p: one ordinary state with P times the features.
Key: B batch, T tokens, G key/value heads, F features, P partitions.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import InputGate


class Routes(InputGate):
    """[B, T, G, P]: e. W is random: equal partitions would stay equal."""

    def __init__(self, shape: HeadShape, partitions: int, top: int):
        super().__init__(shape.hidden, (shape.kv_heads, partitions), 0.0)
        self.top = min(top, partitions)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape) / shape.hidden**0.5)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        share = super().forward(hidden_BTD).softmax(-1)
        kept = share.topk(self.top, -1).indices
        return share * torch.zeros_like(share).scatter(-1, kept, 1.0)


def routed(features: Tensor, route: Tensor) -> Tensor:
    """[.., F] and [.., P] -> [.., F P]."""
    return (features.unsqueeze(-1) * route.unsqueeze(-2)).flatten(-2)
