"""Pieces of the cell that go together though no preset has them: one call and step by step are the definition."""

import pytest
import torch
from linearize.test_mixers import CASES, CUTS, D, G, K, N, V, W, call_of, mixer_of, run
from tolerances import MIXER, assert_near

from subquad import UserError
from subquad.linearize import mixers
from subquad.linearize.mixers import MIXERS, build, unread
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.definition import definition
from subquad.linearize.mixers.knobs import READ_BY

TOGETHER = {
    f"{name} {' '.join(more.values())} {m}": (name, {"feature_map": m, **more})
    for name, more, maps in (
        ("rala", {"normaliser": "mean"}, ("focused", "normed", "polynomial")),
        ("gla", {"decay": "key", "normaliser": "none"}, ("focused", "normed", "polynomial")),
        ("flowformer", {}, ("polynomial",)),
        ("gla", {"container": "levels", "normaliser": "none", "position": "phase"}, ("identity",)),
        ("log_linear", {"combine": "alone"}, ("hedgehog_softmax2",)),
        ("log_linear_delta", {"combine": "alone"}, ("silu_unit",)),
        ("log_linear_delta", {"combine": "added", "output": "norm", "position": "drop"}, ("unit",)),
    )
    for m in maps
}


@pytest.mark.parametrize("case", TOGETHER)
def test_pieces_that_no_preset_puts_together(case, monkeypatch):
    monkeypatch.setitem(CASES, case, TOGETHER[case])
    mixer, call = mixer_of(case), call_of(50)
    with torch.no_grad():
        assert_near(mixer(call), definition(mixer, call), MIXER)
        assert_near(run(mixer, call, CUTS["prefill and steps"])[0], mixer(call), MIXER)


OTHER = {
    "mass": [-1.3], "rank": [3], "features": [6], "horizon": [9], "slots": [5], "partitions": [3], "top": [1], "output": ["scaled"],
    "normaliser": ["none", "clamped", "mean", "feature"],
}  # fmt: skip


def all_of(name: str, options: dict) -> list[torch.Tensor]:
    """What a mixer as built holds, and what it gives."""
    torch.manual_seed(0)
    mixer = build(name, HeadShape(D, G, 3, K, V), W, N, options)
    with torch.no_grad():
        return [*mixer.state_dict().values(), mixer(call_of(24, batch=1))]


@pytest.mark.parametrize("option", READ_BY)
def test_an_option_is_refused_where_it_changes_nothing(option, monkeypatch):
    """The table of who reads what says what the code does, for every preset."""
    monkeypatch.setattr(mixers, "unread", lambda *_: [])
    for name, preset in MIXERS.items():
        for value in OTHER[option] if preset.uses == "cell" and "causal" in preset.directions else ():
            try:
                plain, other = all_of(name, {}), all_of(name, {option: value})
            except UserError:  # pieces that do not go together
                continue
            same = len(plain) == len(other) and all(
                x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(plain, other, strict=True)
            )
            assert value == preset.pieces.get(option) or bool(unread(name, {option: value})) == same, f"{name}, {option} {value}"
