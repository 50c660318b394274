"""Levels: the past in O(log T) blocks, each with a state and a learned weight of its own (log-linear attention; SEEDS 3.2 K11, B06).

    y_t = sum_l lambda_t^(l) q_t^T S_t^(l),   lambda = softplus(W x + b), 1 at the start: then it is the base it wraps

The base is any state that a token changes by a matrix and a sum of its own: every level is turned by the matrix, level 0 gets the sum. Here bases that
only fade; delta_levels.py has the delta rule.

Level 0 holds token t alone. Tokens 0..t-1 are cut by the bits of t: where bit b is set, level b + 1 holds the 2^b tokens that end where the lower
bits begin. Tokens are counted as they are written. The highest level keeps all that is older.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F features, V columns of the state, L levels, n blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import InputGate

LEVELS = 12  # the highest holds everything beyond 1,024 tokens
ONE = math.log(math.e - 1)  # softplus of it is 1
DENSE = 64  # blocks up to this size are read as weights, larger ones as states


class LevelWeights(InputGate):
    """[B, T, G, R, L]: lambda."""

    def __init__(self, shape: HeadShape):
        super().__init__(shape.hidden, (shape.kv_heads, shape.groups, LEVELS), ONE)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.softplus(super().forward(hidden_BTD))


def _vector(log: Tensor | None, k: Tensor) -> Tensor:
    """Log decay as [B, T, G, 1 or F]."""
    if log is None:
        return k.new_zeros(*k.shape[:3], 1)
    return log if log.dim() == 4 else log.unsqueeze(-1)


class Places:
    """Where T tokens that follow `before` others stand in blocks: the stretch of a power of two that holds them, which may begin before them.

    Two neighbours of the length of `block` meet at the same level wherever they are, except the largest two: their level counts from the first token.
    """

    def __init__(self, T: int, before: int):
        self.T, self.chunk, self.before = T, 1 << max(T - 1, 1).bit_length(), before
        self.skip = before % self.chunk
        self.size = self.chunk if self.skip + T <= self.chunk else 2 * self.chunk

    def fill(self, *tensors: Tensor) -> list[Tensor]:
        """Zeros on both sides: tokens that write and turn nothing."""
        return [F.pad(x, (0, 0) * (x.dim() - 2) + (self.skip, self.size - self.skip - self.T)) for x in tensors]

    def cut(self, x: Tensor) -> Tensor:
        return x[:, self.skip : self.skip + self.T]

    def level(self, block: int) -> int:
        n = self.before // self.chunk
        return min(block.bit_length() + ((n ^ (n + 1)).bit_length() - 1 if block == self.chunk else 0), LEVELS - 1)


def read_all(q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, weight: Tensor, before: int = 0) -> Tensor:
    """y [B, T, G, R, V] of tokens among themselves, `before` others come first; O(T log T). A level's blocks pair up: the second reads the first."""
    places = Places(k.shape[1], before)
    q, k, v, log, weight = places.fill(q, k, v, _vector(log, k), weight)
    total = log.cumsum(1)
    out = weight[..., :1] * (q * k.unsqueeze(3)).sum(-1, keepdim=True) * v.unsqueeze(3)
    for b in range(places.size.bit_length() - 1):
        block = 1 << b
        first, second = (lambda x, h=h, block=block: x.unflatten(1, (-1, 2, block))[:, :, h] for h in (0, 1))  # [B, n, block, ..]
        edge = first(total)[:, :, -1:]  # all that fades meets at the end of the first block
        k1, v1 = first(k) * (edge - first(total)).exp(), first(v)
        q2 = second(q) * (second(total) - edge).exp().unsqueeze(4)
        if block <= DENSE:
            y = torch.einsum("bnsgrf,bnjgf,bnjgv->bnsgrv", q2, k1, v1) if block == 1 else _dense(q2, k1, v1)
        else:
            y = torch.einsum("bnsgrf,bngfv->bnsgrv", q2, torch.einsum("bnjgf,bnjgv->bngfv", k1, v1))
        y = y * second(weight)[..., places.level(block)].unsqueeze(-1)
        out = out + torch.stack([torch.zeros_like(y), y], 2).flatten(1, 3)
    return places.cut(out)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnsgrj,bnjgv->bnsgrv", torch.einsum("bnsgrf,bnjgf->bnsgrj", q, k), v)


def read_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor | None,
    weight: Tensor,
    on_BT: Tensor,
    states: Tensor,
    written_B: Tensor,
    beta_BTG: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same one token at a time from states [B, L, G, F, V] of `written` tokens: (y, states, written). Rows without a token stay as they are.

    With beta (0 in such rows) the token also takes off what the states say about its key: the delta rule.
    """
    log, out, place = _vector(log, k), [], torch.arange(LEVELS, device=k.device)
    for t in range(k.shape[1]):
        on = on_BT[:, t]
        # Token number `written` comes: its trailing zeros say how many lower levels close, all into the level above them.
        zeros = (written_B & -written_B).clamp_min(1).float().log2().long()
        into = (zeros + 1).clamp_max(LEVELS - 1)
        closing = (place <= zeros[:, None]) & (place < LEVELS - 1) & (written_B > 0)[:, None] & on[:, None]
        moved = (states * closing[..., None, None, None]).sum(1, keepdim=True)
        target = (place == into[:, None])[..., None, None, None]
        states = states.masked_fill(closing[..., None, None, None], 0.0) + moved * target
        states = states * log[:, t].exp()[:, None, :, :, None]
        fresh = k[:, t, :, :, None] * v[:, t, :, None] * on[:, None, None, None]
        if beta_BTG is not None:
            push = beta_BTG[:, t, :, None, None] * k[:, t, :, :, None]  # [B, G, F, 1]
            states = states - push.unsqueeze(1) * torch.einsum("bgf,blgfv->blgv", k[:, t], states).unsqueeze(3)
            fresh = fresh * beta_BTG[:, t, :, None, None]
        states = torch.cat([states[:, :1] + fresh.unsqueeze(1), states[:, 1:]], 1)
        written_B = written_B + on
        out.append(torch.einsum("bgrf,blgfv,bgrl->bgrv", q[:, t], states, weight[:, t]))
    return torch.stack(out, 1), states, written_B


def levels_between(t: Tensor, j: Tensor) -> Tensor:
    """The level at which token t holds token j <= t; both counted as they are written."""
    level = (t ^ j).clamp_min(1).double().log2().floor().long() + 1
    return torch.where(t == j, 0, level.clamp_max(LEVELS - 1))


def level_of(T: int) -> Tensor:
    """[T, T]: the level at which query t holds token j; only j <= t mean something."""
    return levels_between(torch.arange(T)[:, None], torch.arange(T)[None])
