"""Pieces of the cell that go together though no preset has them: one call and step by step are the definition."""

import pytest
import torch
from linearize.test_mixers import CASES, CUTS, call_of, mixer_of, run
from tolerances import MIXER, assert_near

from subquad.linearize.mixers.definition import definition

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
