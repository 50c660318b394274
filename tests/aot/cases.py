"""What ships: every op, forward and backward, in the shapes the budget is kept for. Nothing is executed (see compiler.py).

Key: K = V = F = D head size.
"""

import torch

from subquad.kernels.triton import functions

B, T, H = 64, 512, 2  # enough heads that one program walks a sequence; LONG takes the form with many programs


def tensor(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def qkv(D, batch=B, length=T):
    return [tensor(batch, length, H, D) for _ in range(3)]


def gate(kind, D, batch=B):
    return {"none": None, "scalar": tensor(batch, T, H, dtype=torch.float32), "vector": tensor(batch, T, H, D, dtype=torch.float32)}[kind]


def backward(outputs) -> None:
    """Launch the backward pass of what a case gave, if it has one."""
    wanted = [x.float().sum() for x in outputs if x is not None and x.requires_grad]
    if wanted:
        sum(wanted).backward()


def additive(D, decay, batch=B):
    state = tensor(batch, H, D, D, dtype=torch.float32)
    return functions.additive(*qkv(D, batch), gate(decay, D, batch), initial_state=state, output_final_state=True)


def delta(D, decay):
    beta, state = tensor(B, T, H, dtype=torch.float32), tensor(B, H, D, D, dtype=torch.float32)
    return functions.delta(*qkv(D), beta, gate(decay, D), initial_state=state, output_final_state=True)


def banded(D):
    return functions.banded(*qkv(D), window=64, sinks=4)[:2]


def window_linear(D, decay, batch=B, length=T):
    fq, fk = (tensor(batch, length, H, D) for _ in range(2))
    mix, state = tensor(batch, length, H), tensor(batch, H, D, D + 1, dtype=torch.float32)
    g = {"none": None, "scalar": tensor(batch, length, H, dtype=torch.float32), "vector": tensor(batch, length, H, D, dtype=torch.float32)}[
        decay
    ]
    return functions.window_linear(*qkv(D, batch, length), fq, fk, mix, g, window=64, sinks=4, initial_state=state, output_final_state=True)


def mapped(D, op, decay):
    """Hedgehog features of D numbers made inside: 2 D of them."""
    F, y = 2 * D, [tensor(B, T, H, D) for _ in range(2)]
    columns = D + (op == "window_linear")
    state, g = tensor(B, H, F, columns, dtype=torch.float32), gate(decay, F)
    more = dict(initial_state=state, output_final_state=True, feature_map="hedgehog_softmax")
    if op == "additive":
        return functions.additive(*y, tensor(B, T, H, D), g, **more)
    return functions.window_linear(*qkv(D), *y, tensor(B, T, H), g, window=64, sinks=4, **more)


def steps(D):
    q, k, v = (torch.zeros(B, H, D, dtype=torch.bfloat16) for _ in range(3))
    window = torch.zeros(B, 64, H, D, dtype=torch.bfloat16)
    return (
        *functions.additive_step(q, k, v, torch.zeros(B, H, D, D), torch.zeros(B, H)),
        *functions.delta_step(q, k, v, torch.zeros(B, H), torch.zeros(B, H, D, D), torch.zeros(B, H)),
        *functions.window_linear_step(q, window, window, q, torch.zeros(B, H), torch.zeros(B, H, D, D + 1), k, v),
    )


CASES = {
    f"{name}-{D}": (function, (D, *more))
    for D in (64, 128)
    for name, function, more in (
        ("additive-none", additive, ("none",)),
        ("additive-scalar", additive, ("scalar",)),
        ("additive-vector", additive, ("vector",)),
        ("delta-none", delta, ("none",)),
        ("delta-scalar", delta, ("scalar",)),
        ("banded", banded, ()),
        ("window_linear-none", window_linear, ("none",)),
        ("window_linear-scalar", window_linear, ("scalar",)),
        ("window_linear-vector", window_linear, ("vector",)),
        ("window_linear-none-long", window_linear, ("none", 1, 4096)),
        ("mapped-additive-none", mapped, ("additive", "none")),
        ("mapped-additive-scalar", mapped, ("additive", "scalar")),
        ("mapped-additive-vector", mapped, ("additive", "vector")),
        ("mapped-window_linear-none", mapped, ("window_linear", "none")),
        ("mapped-window_linear-scalar", mapped, ("window_linear", "scalar")),
        ("mapped-window_linear-vector", mapped, ("window_linear", "vector")),
        ("steps", steps, ()),
    )
}
NO_MATRIX = {"decay_gradient_kernel", "feature_kernel", "step_kernel", "window_step_kernel"}  # bound by bytes, not by products
