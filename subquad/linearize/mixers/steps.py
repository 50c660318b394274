"""Recurrences that have no chunkwise form here and go token by token (SEEDS 3.5): momentum (B15) and element-wise decay (B03, Mamba-1).

Only what depends on the token before is in a loop, for forward and backward by hand; the rest is done for CHUNK tokens at a time, whose states are kept
for the backward pass. Rows without a token (on False) leave their state alone.

Key: B batch, T tokens, C tokens of a chunk, G key/value heads, R query heads per key/value head, N = B G, F features, V value size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16  # forward and backward of 512 tokens, three heads of 64 x 64, seconds: momentum 0.21, with 64 tokens 0.25; element-wise 0.10, 0.16


def momentum_steps(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, eta: Tensor, log_decay: Tensor, on: Tensor, state: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P <- eta P + beta k (v - S^T k)^T,  S <- a S + P,  y = S^T q (Titans, linear memory): (y [B, T, G, R, V], S, P [B, G, F, V]).

    The gradient is taken at the memory of the token before; q [B, T, G, R, F], k [B, T, G, F], beta, eta, log_decay [B, T, G]; fp32.
    """
    off, out = ~on[:, :, None], []
    factors = beta.masked_fill(off, 0), eta.masked_fill(off, 1), log_decay.masked_fill(off, 0).exp(), (~off).to(eta.dtype).expand_as(eta)
    shape = state.shape
    state, momentum = state.flatten(0, 1), momentum.flatten(0, 1)
    for part in _chunks(q.shape[1]):
        rows = [_by_time(x[:, part]).unsqueeze(-2) for x in (k, v)]
        gates = [_by_time(x[:, part])[..., None, None] for x in factors]
        states, momentum = _MomentumSteps.apply(*rows, *gates, state, momentum)
        state = states[-1]
        out.append((_by_time(q[:, part]) @ states).unflatten(1, shape[:2]).transpose(0, 1))
    return torch.cat(out, 1), state.view(shape), momentum.view(shape)


def selective_steps(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, on: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_fv <- exp(-dt_v a_fv) S_fv + dt_v k_f v_v,  y = S^T q (Mamba-1): (y [B, T, G, R, V], S [B, G, F, V]). dt [B, T, G, V], a [G, F, V] > 0.

    In fp64, twice as slow: an output norm follows, under which a query whose terms cancel counts as much as the others (one of 384 read 1e-4 of its
    terms, and gradients were off by 9e-3, now 6e-7).
    """
    dtype = state.dtype
    q, k, v, dt, a, state = (x.double() for x in (q, k, v, dt, a, state))
    dt = dt.masked_fill(~on[:, :, None, None], 0)
    written, out = dt * v, []
    for part in _chunks(q.shape[1]):
        fade = torch.exp(-dt[:, part, :, None] * a)
        states = _SelectiveSteps.apply(fade, k[:, part, :, :, None] * written[:, part, :, None], state)
        state = states[:, -1]
        out.append((q[:, part] @ states).to(dtype))
    return torch.cat(out, 1), state.to(dtype)


def _chunks(T: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, T, CHUNK))


def _by_time(x: Tensor) -> Tensor:
    """[B, C, G, *] as [C, N, *]."""
    return x.transpose(0, 1).flatten(1, 2)


class _SelectiveSteps(torch.autograd.Function):
    """S_t = fade_t S_{t-1} + write_t: all states [B, C, G, F, V]; fade, write [B, C, G, F, V], state [B, G, F, V]."""

    @staticmethod
    def forward(ctx, fade: Tensor, write: Tensor, state: Tensor) -> Tensor:
        states, before = torch.empty_like(write), state
        for fade_t, write_t, state_t in zip(fade.unbind(1), write.unbind(1), states.unbind(1), strict=True):
            before = torch.addcmul(write_t, fade_t, before, out=state_t)
        ctx.save_for_backward(fade, states, state)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states: Tensor) -> tuple[Tensor, ...]:
        fade, states, state = ctx.saved_tensors
        d_write = d_states.clone(memory_format=torch.contiguous_format)
        fades, slopes = fade.unbind(1), d_write.unbind(1)
        for t in range(len(slopes) - 1, 0, -1):
            slopes[t - 1].addcmul_(fades[t], slopes[t])
        before = torch.cat([state.unsqueeze(1), states[:, :-1]], 1)
        return d_write * before, d_write, fades[0] * slopes[0]


class _MomentumSteps(torch.autograd.Function):
    """P_t = eta_t P_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, S_t = a_t S_{t-1} + on_t P_t: (all S [C, N, F, V], the last P [N, F, V]).

    k [C, N, 1, F], v [C, N, 1, V]; beta, eta, a, on [C, N, 1, 1]; state, momentum [N, F, V].
    """

    @staticmethod
    def forward(ctx, k, v, beta, eta, a, on, state, momentum) -> tuple[Tensor, Tensor]:
        C, wrong = len(k), torch.empty_like(v, memory_format=torch.contiguous_format)
        S, P = state.new_empty(C + 1, *state.shape), state.new_empty(C + 1, *state.shape)
        S[0], P[0] = state, momentum
        for t in range(C):
            torch.baddbmm(v[t], k[t], S[t], alpha=-1, out=wrong[t])
            torch.mul(P[t], eta[t], out=P[t + 1]).baddbmm_(k[t].mT, wrong[t] * beta[t])
            torch.mul(S[t], a[t], out=S[t + 1]).addcmul_(P[t + 1], on[t])
        ctx.save_for_backward(k, wrong, beta, eta, a, on, S, P)
        return S[1:].clone(), P[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states: Tensor, d_momentum: Tensor) -> tuple[Tensor | None, ...]:
        k, wrong, beta, eta, a, on, S, P = ctx.saved_tensors
        dS, dP, d_push = torch.empty_like(S), torch.empty_like(P[1:]), torch.empty_like(wrong)  # d_push: of beta_t (v_t - S_{t-1}^T k_t)
        dS[0], dS[1:] = 0, d_states
        for t in range(len(k) - 1, -1, -1):
            torch.addcmul(d_momentum, dS[t + 1], on[t], out=dP[t])
            torch.bmm(k[t], dP[t], out=d_push[t])
            dS[t].addcmul_(dS[t + 1], a[t]).baddbmm_(k[t].mT, d_push[t] * beta[t], alpha=-1)
            d_momentum = dP[t] * eta[t]
        d_v = d_push * beta
        d_k = (wrong * beta) @ dP.mT - d_v @ S[:-1].mT
        d_beta = (d_push * wrong).sum((-1, -2), keepdim=True)
        d_eta, d_a = (dP * P[:-1]).sum((-1, -2), keepdim=True), (dS[1:] * S[:-1]).sum((-1, -2), keepdim=True)
        return d_k, d_v, d_beta, d_eta, d_a, None, dS[0], d_momentum
