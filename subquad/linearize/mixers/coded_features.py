"""Feature maps onto codes: sign codes (SEEDS A17) and codewords (SEEDS A19). Key: as in feature_maps.py; S codewords, N bits."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.random_features import orthogonal_gaussian


class Codes(nn.Module):
    """[sqrt(N + 1); sign(A x^)]: weights (N + 1) + h_q.h_k >= 1 of N-bit codes of the direction x^ (SEEDS A17, the paper's sum over all tokens).

    Codes are signs of learned projections, shared by queries and keys of a head as in the paper; the hash of the paper projects Gaussian kernels
    to anchors instead. Straight-through gradients inside [-1, 1].
    """

    BITS = 16

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, features: int = 0, **options):
        super().__init__()
        self.side, self.bits = side, features or self.BITS
        if side == "k":
            # Unit rows times sqrt(K): projections of a unit vector are of size one.
            start = F.normalize(orthogonal_gaussian(self.bits, size), dim=-1) * size**0.5
            self.planes = nn.Parameter(start.repeat(heads[0], 1, 1))  # [G, N, K]
        self.keys: tuple[Codes, ...] = ()

    @classmethod
    def width(cls, size: int, features: int = 0, **options) -> int:
        return (features or cls.BITS) + 1

    def tie(self, keys: "Codes") -> None:
        self.keys = (keys,)

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        planes = self.planes if self.side == "k" else self.keys[0].planes
        letters = "g" if x.dim() == 4 else "gr"
        y = torch.einsum(f"bt{letters}k,gnk->bt{letters}n", F.normalize(x.float(), dim=-1), planes.float())
        soft = y.clamp(-1, 1)
        code = torch.where(y >= 0, 1.0, -1.0)
        return torch.cat([torch.full_like(y[..., :1], (self.bits + 1) ** 0.5), soft + (code - soft).detach()], -1)


class Codebook(nn.Module):
    """Keys: one-hot of the nearest codeword c_z. Queries: log features q.c_s / sqrt(K): exact softmax over quantised keys (SEEDS A19).

    Under a joint normaliser the sum beside the window is the paper's: q.c_s + log n_s. Codewords learn through the queries.
    """

    CODES = 64

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, features: int = 0, **options):
        super().__init__()
        self.side, self.count, self.scale = side, features or self.CODES, size**-0.5
        if side == "k":
            start = orthogonal_gaussian(self.count, size)
            self.codewords = nn.Parameter(start.repeat(heads[0], 1, 1))  # [G, S, K]
        self.keys: tuple[Codebook, ...] = ()

    @classmethod
    def width(cls, size: int, features: int = 0, **options) -> int:
        return features or cls.CODES

    def untouched(self) -> bool:
        """The codewords are those it was built with."""
        start = orthogonal_gaussian(self.count, self.codewords.shape[-1]).to(self.codewords)
        return torch.equal(self.codewords, start.expand_as(self.codewords))

    def tie(self, keys: "Codebook") -> None:
        self.keys = (keys,)

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        if self.side == "q":
            return torch.einsum("btgrk,gsk->btgrs", x.float(), self.keys[0].codewords.float()) * self.scale
        words = self.codewords.float()
        distance = words.square().sum(-1) - 2 * torch.einsum("btgk,gsk->btgs", x.float(), words)
        return F.one_hot(distance.argmin(-1), self.count).float()
