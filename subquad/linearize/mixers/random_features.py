"""Random positive features: exp(w.x - |x|^2 / 2) averages to exp(q.k) over Gaussian w (SEEDS A01, A21).

Both maps give log features; the cell keeps the maximum out of the exponent. Key: as in feature_maps.py; M random features, C components.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

SEED = 20240601


def orthogonal_gaussian(features: int, size: int, seed: int = SEED) -> Tensor:
    """[M, K]: blocks of orthogonal rows whose lengths are those of Gaussian rows (chi with K degrees of freedom)."""
    generator = torch.Generator().manual_seed(seed)
    normal = dict(generator=generator, device="cpu", dtype=torch.float64)
    blocks = [_rotation(torch.randn(size, size, **normal)).T for _ in range(-(-features // size))]
    length = torch.randn(features, size, **normal).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:features] * length).float()


def _rotation(gaussian: Tensor) -> Tensor:
    """A rotation drawn evenly: LAPACK's Q has signs of its own, which would bias the estimate; those of R's diagonal undo them."""
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def _count(size: int, features: int) -> int:
    return features or 2 * size


class Favor(nn.Module):
    """log phi(x)_r = w_r.x - |x|^2 / 2 - log(M) / 2 (Performer, positive orthogonal features; SEEDS A01). No parameters: w is a buffer."""

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, features: int = 0, **options):
        super().__init__()
        self.scale = scale
        # Queries and keys share the draw: the estimate is of exp(q.k) only when both sides see the same w.
        self.register_buffer("omega_MK", orthogonal_gaussian(_count(size, features), size))

    @classmethod
    def width(cls, size: int, features: int = 0, **options) -> int:
        return _count(size, features)

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        x = x.float() * self.scale
        # A copy: a buffer mapped from a file may lie off the boundaries of vector units, where products round otherwise.
        omega = self.omega_MK.float().clone()
        return x @ omega.T - x.square().sum(-1, keepdim=True) / 2 - math.log(self.omega_MK.shape[0]) / 2


class Mixture(nn.Module):
    """The same with learned frequencies w_cr = mu_c + sigma_c * eps_r of C = 2 Gaussian components (GMM-PRF; SEEDS A21).

    Each key/value head has its own mu, sigma and component weights; they start at 0, 1 and 1/C: Performer's features. The components share one
    normaliser here, log(weight_c) being part of the log features of keys; the paper's code averages normalised outputs instead.
    """

    COMPONENTS = 2

    def __init__(self, side: str, heads: tuple[int, ...], size: int, scale: float, features: int = 0, **options):
        super().__init__()
        self.scale, self.side = scale, side
        G, C = heads[0], self.COMPONENTS
        self.register_buffer("epsilon_MK", orthogonal_gaussian(_count(size, features) // C, size, SEED + 1))
        # Queries look their frequencies up in the keys' map (Cell ties them): the estimate needs the same w on both sides.
        if side == "k":
            self.mean = nn.Parameter(torch.zeros(G, C, size))
            self.spread = nn.Parameter(torch.ones(G, C, size))
            self.share = nn.Parameter(torch.zeros(G, C))
        self.keys: tuple[Mixture, ...] = ()

    @classmethod
    def width(cls, size: int, features: int = 0, **options) -> int:
        return _count(size, features) // cls.COMPONENTS * cls.COMPONENTS

    def tie(self, keys: "Mixture") -> None:
        self.keys = (keys,)  # in a tuple: not a submodule, its parameters stay with the keys

    def forward(self, x: Tensor, position_BT: Tensor | None = None) -> Tensor:
        own = self if self.side == "k" else self.keys[0]
        x = x.float() * self.scale
        omega = own.mean.float()[:, :, None] + own.spread.float()[:, :, None] * self.epsilon_MK.float()  # [G, C, M, K]
        letters = "g" if x.dim() == 4 else "gr"
        logs = torch.einsum(f"bt{letters}k,gcmk->bt{letters}cm", x, omega)
        logs = logs - x.square().sum(-1)[..., None, None] / 2 - math.log(omega.shape[2]) / 2
        if self.side == "k":
            logs = logs + own.share.float().log_softmax(-1)[:, :, None]
        return logs.flatten(-2)
