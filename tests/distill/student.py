"""A student small enough for tests, with the context managers the real one has, and no knowledge of `linearize`.

Its "mixer" is one factor per channel of each layer's attention output, 0.5 at the start; with factors of 1 the student is the teacher.
"""

from contextlib import contextmanager

import helpers
import numpy as np
import torch
from torch import nn

from subquad.distill.data import Tokens
from subquad.distill.stage import Stage

HIDDEN, HEADS = 64, 4


def student(**config):
    """A tiny llama with mixers in every layer."""
    model = helpers.tiny_model(num_hidden_layers=2, **config)
    model.exact, model.on_layer = False, None
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.mixer = nn.Parameter(torch.full((HIDDEN,), 0.5))
        layer.self_attn.o_proj.register_forward_pre_hook(_mix(model, index, layer.self_attn))
    return model


def _mix(model, index, attention):
    def hook(module, inputs):
        exact = inputs[0]
        if model.exact:
            return None
        if model.on_layer is None:
            return (exact * attention.mixer,)
        with torch.enable_grad():
            mixed = (exact.detach() * attention.mixer).unflatten(-1, (HEADS, -1))
        model.on_layer(index, mixed, exact.unflatten(-1, (HEADS, -1)), None)
        return None

    return hook


@contextmanager
def as_teacher(model):
    model.exact = True
    try:
        yield
    finally:
        model.exact = False


@contextmanager
def transfer(model, on_layer):
    model.on_layer = on_layer
    try:
        yield
    finally:
        model.on_layer = None


def mixers(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("mixer")}


def projections(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "self_attn" in name]


def text(count=2000, seed=0):
    """Tokens with something to learn: each is one of four that can follow the token before."""
    draw, ids = np.random.default_rng(seed), [0]
    for jump in draw.integers(0, 4, count - 1):
        ids.append((5 * ids[-1] + int(jump) + 1) % 250)
    return Tokens(np.array(ids, dtype=np.int32))


def stage(**changes):
    plain = {"name": "heal", "train": "mixers", "inputs": "own", "losses": {"kl": 1.0}, "tokens": 320, "lr": 0.02}
    return Stage(**plain | {"context": 16, "batch": 2} | changes)
