"""docs/add_a_mixer.md, followed word by word: its code is taken from the page, and what it adds is held to the tests of every mixer."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from linearize.test_mixers import call_of, part, run
from tolerances import MIXER, assert_near

from subquad.linearize import mixers
from subquad.linearize.mixers import feature_maps, presets
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.definition import definition

PAGE = Path(__file__).parents[2] / "docs" / "add_a_mixer.md"
B, D, G, R, K, V = 3, 24, 2, 3, 8, 6  # the sizes of call_of


def blocks() -> list[tuple[str, str]]:
    """(kind, code) of the page's code: '' a function, 'row' an entry of a table, 'file' a module."""
    return re.findall(r"```python ?(\w*)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def added(monkeypatch):
    """Everything the page adds, in place for one test."""
    (_, function), (_, map_row), (_, preset), (_, module), (_, alone) = blocks()
    names = dict(vars(feature_maps))
    exec(function, names)
    for name, row in eval("{" + map_row + "}", names).items():
        monkeypatch.setitem(feature_maps.FEATURE_MAPS, name, row)
    for code in (preset, alone):
        for name, entry in eval("{" + code + "}", dict(vars(presets))).items():
            monkeypatch.setitem(presets.MIXERS, name, entry)
    written = types.ModuleType("subquad.linearize.mixers.mean_value")
    exec(module, written.__dict__)
    monkeypatch.setitem(sys.modules, written.__name__, written)
    monkeypatch.setitem(mixers.CLASSES, "mean_value", f"{written.__name__}:MeanValue")


def test_page_has_the_blocks_the_test_takes():
    assert [kind for kind, _ in blocks()] == ["", "row", "row", "file", "row"]


@pytest.mark.parametrize("name", ["squared", "mean_value"])
def test_what_the_page_adds_works(added, name):
    torch.manual_seed(0)
    mixer, call = mixers.build(name, HeadShape(D, G, R, K, V), 6, 2), call_of(50)
    with torch.no_grad():
        whole = mixer(call)
        for cuts in ([50], [3, 20, 21, 44, 50], list(range(1, 51))):
            out, state = run(mixer, call, cuts)
            assert_near(out, whole, MIXER, str(cuts))
        assert state.memory[0].numel() * 4 == mixer.memory_bytes(mixer.shape, **mixers.pieces(name))
    if name == "squared":
        assert_near(whole, definition(mixer, call), MIXER)
    else:
        mean = call.v_BTGV.cumsum(1) / torch.arange(1, 51)[:, None, None]
        window = mixers.build("window", mixer.shape, 6, 2)(part(call))
        assert_near(whole, (window + mean.unsqueeze(3)) / 2, MIXER)
