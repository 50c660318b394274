"""Recurrences token by token against the same written plainly under autograd: outputs, states, gradients, in fp64 and across chunk borders.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K keys, V values.
"""

import pytest
import torch

from subquad.linearize.mixers.steps import CHUNK, momentum_steps, selective_steps

G, R, K, V = 2, 3, 5, 4


def plain_momentum(q, k, v, beta, eta, log_decay, on, S, P):
    out = []
    for t in range(q.shape[1]):
        wrong = v[:, t] - torch.einsum("bgk,bgkv->bgv", k[:, t], S)
        gates = [x[:, t, :, None, None] for x in (beta, eta, log_decay.exp())]
        pushed = gates[1] * P + gates[0] * torch.einsum("bgk,bgv->bgkv", k[:, t], wrong)
        keep = on[:, t, None, None, None]
        S, P = torch.where(keep, gates[2] * S + pushed, S), torch.where(keep, pushed, P)
        out.append(torch.einsum("bgrk,bgkv->bgrv", q[:, t], S))
    return torch.stack(out, 1), S, P


def plain_selective(q, k, v, dt, a, on, S):
    out = []
    for t in range(q.shape[1]):
        stepped = torch.exp(-dt[:, t, :, None] * a) * S + torch.einsum("bgk,bgv->bgkv", k[:, t], dt[:, t] * v[:, t])
        S = torch.where(on[:, t, None, None, None], stepped, S)
        out.append(torch.einsum("bgrk,bgkv->bgrv", q[:, t], S))
    return torch.stack(out, 1), S


def momentum_arguments(B: int, T: int) -> list[torch.Tensor]:
    k = torch.nn.functional.normalize(torch.randn(B, T, G, K), dim=-1)
    gates = [torch.rand(B, T, G), torch.rand(B, T, G), -torch.rand(B, T, G)]
    return [torch.randn(B, T, G, R, K), k, torch.randn(B, T, G, V), *gates, torch.rand(B, T) > 0.2, torch.randn(B, G, K, V), torch.randn(B, G, K, V)]


def selective_arguments(B: int, T: int) -> list[torch.Tensor]:
    rows = [torch.randn(B, T, G, R, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V), torch.rand(B, T, G, V)]
    return [*rows, torch.rand(G, K, V), torch.rand(B, T) > 0.2, torch.randn(B, G, K, V)]


RECURRENCES = {
    "momentum": (momentum_steps, plain_momentum, momentum_arguments),
    "selective": (selective_steps, plain_selective, selective_arguments),
}


def results(function, arguments) -> list[torch.Tensor]:
    """Outputs, last states and the gradients of all floating-point arguments."""
    given = [x.double().requires_grad_() if x.is_floating_point() else x for x in arguments]
    outputs = function(*given)
    torch.manual_seed(1)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    slopes = torch.autograd.grad(loss, [x for x in given if x.requires_grad])
    return [*outputs, *slopes]


@pytest.mark.parametrize("B, T", [(1, 1), (2, CHUNK - 1), (3, CHUNK), (2, 2 * CHUNK + 3)])
@pytest.mark.parametrize("name", RECURRENCES)
def test_as_written_plainly(name, B, T):
    function, plain, make = RECURRENCES[name]
    torch.manual_seed(0)
    arguments = make(B, T)
    found, wanted = results(function, arguments), results(plain, arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
