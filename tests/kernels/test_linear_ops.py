"""Ops 1 and 2: the chunkwise form in fp32 against its definition, one token at a time in fp64: outputs, final state, gradients of every input.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F features, V value size.
"""

import pytest
import torch
from tolerances import OP, OP_GRADIENT, assert_near

from subquad.kernels.additive import MIN_LOG_DECAY, additive_chunk, additive_definition
from subquad.kernels.delta import delta_chunk, delta_definition

B, G, F, V = 2, 2, 8, 5
LENGTHS = (1, 5, 63, 64, 65, 130, 500)  # around both chunk sizes, 32 and 64
GROUPS = (1, 3, 8)


def decay(kind: str, length: int):
    """Natural log, <= 0. `weak` is what mixers start with, `strong` is near the limit that additive_chunk states."""
    if kind == "none":
        return None
    shape = (B, length, G, F) if kind.startswith("vector") else (B, length, G)
    low = 0.98 * MIN_LOG_DECAY if kind.endswith("strong") else -0.1
    return torch.rand(shape, dtype=torch.float64) * low


def inputs(op: str, length: int, kind: str, groups: int = 3, state: bool = True) -> dict:
    torch.manual_seed(length)
    numbers = dict(dtype=torch.float64)
    q, k, v = (
        torch.randn(B, length, G, groups, F, **numbers),
        torch.randn(B, length, G, F, **numbers),
        torch.randn(B, length, G, V, **numbers),
    )
    found = {"q": q, "k": k, "v": v}
    if op == "delta":
        found |= {"k": torch.nn.functional.normalize(k, dim=-1), "beta": torch.rand(B, length, G, **numbers)}
    found |= {"log_decay": decay(kind, length), "initial_state": torch.randn(B, G, F, V, **numbers) if state else None}
    return found


OPS = {"additive": (additive_chunk, additive_definition), "delta": (delta_chunk, delta_definition)}
KINDS = {
    "additive": ("none", "scalar", "vector", "scalar strong", "vector strong"),
    "delta": ("none", "scalar", "scalar strong"),
}
CASES = [(op, kind) for op in OPS for kind in KINDS[op]]


def results(fn, given: dict, dtype: torch.dtype):
    """(output, state, gradients of every tensor) of a loss that reads all of the output and all of the state."""
    leaves = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in given.items()}
    out, state = fn(*leaves.values())
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in (out, state))
    loss.backward()
    return out.detach(), state.detach(), {name: x.grad for name, x in leaves.items() if x is not None}


def compare(op: str, given: dict) -> None:
    chunk, definition = OPS[op]
    out, state, gradients = results(chunk, given, torch.float32)
    wanted_out, wanted_state, wanted_gradients = results(definition, given, torch.float64)
    assert_near(out, wanted_out, OP, "output")
    assert_near(state, wanted_state, OP, "state")
    for name, gradient in gradients.items():
        assert_near(gradient, wanted_gradients[name], OP_GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("op", "kind"), CASES, ids=[f"{op}-{kind}" for op, kind in CASES])
def test_chunks_are_the_definition(op, kind, length):
    compare(op, inputs(op, length, kind))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("op", OPS)
def test_query_groups_share_keys(op, groups):
    compare(op, inputs(op, 65, "scalar", groups))


@pytest.mark.parametrize(("op", "kind"), CASES, ids=[f"{op}-{kind}" for op, kind in CASES])
def test_without_a_state_to_start_from(op, kind):
    compare(op, inputs(op, 70, kind, state=False))


@pytest.mark.parametrize(("op", "kind"), CASES, ids=[f"{op}-{kind}" for op, kind in CASES])
def test_state_carries_over(op, kind):
    """Three calls, the last of one token, are one call."""
    chunk, given = OPS[op][0], inputs(op, 100, kind)
    state = given.pop("initial_state")
    wanted, wanted_state = chunk(*given.values(), state)
    outs = []
    for start, end in ((0, 70), (70, 99), (99, 100)):
        out, state = chunk(*(None if x is None else x[:, start:end] for x in given.values()), state)
        outs.append(out)
    assert_near(torch.cat(outs, 1), wanted, OP)
    assert_near(state, wanted_state, OP)


@pytest.mark.parametrize("kind", KINDS["additive"][1:])
def test_decay_beyond_the_limit_stays_finite(kind):
    """Stronger than exp(-5) a step: nothing is left of a token after it either way; numbers and gradients must stay finite."""
    given = inputs("additive", 130, kind)
    given["log_decay"] = given["log_decay"] * 20
    out, state, gradients = results(additive_chunk, given, torch.float32)
    assert all(x.isfinite().all() for x in (out, state, *gradients.values()))


def test_scalar_decay_has_no_limit():
    given = inputs("additive", 130, "scalar")
    given["log_decay"] = given["log_decay"] * 300
    compare("additive", given)
    given = inputs("delta", 130, "scalar")
    given["log_decay"] = given["log_decay"] * 300
    compare("delta", given)


@pytest.mark.parametrize("op", OPS)
def test_low_precision_inputs_keep_an_fp32_state(op):
    given = {name: None if x is None else x.bfloat16() for name, x in inputs(op, 65, "scalar").items()}
    out, state = OPS[op][0](*given.values())
    assert out.dtype == state.dtype == torch.float32
    wanted, wanted_state = OPS[op][1](*(x.double() for x in given.values()))
    assert_near(out, wanted, OP)
    assert_near(state, wanted_state, OP)
