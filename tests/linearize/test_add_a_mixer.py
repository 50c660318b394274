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
from subquad.linearize.mixers import feature_maps, normalisers, presets, reads, writes
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.definition import definition, weights_of
from subquad.linearize.mixers.normalisers import EPS, NORMALISERS
from subquad.linearize.mixers.reads import READS
from subquad.linearize.mixers.writes import WRITES

PAGE = Path(__file__).parents[2] / "docs" / "add_a_mixer.md"
B, D, G, R, K, V = 3, 24, 2, 3, 8, 6  # the sizes of call_of


def blocks() -> list[tuple[str, str]]:
    """(kind, code) of the page's code: '' a function, 'row' an entry of a table, 'file' a module."""
    return re.findall(r"```python ?(\w*)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def added(monkeypatch):
    """Everything the page adds, in place for one test."""
    (_, function), (_, map_row), (_, preset), (_, write), (_, read), (_, normaliser), (_, rooted), (_, module), (_, alone) = blocks()
    names = dict(vars(feature_maps))
    exec(function, names)
    for name, row in eval("{" + map_row + "}", names).items():
        monkeypatch.setitem(feature_maps.FEATURE_MAPS, name, row)
    for table, code, module_of in ((WRITES, write, writes), (NORMALISERS, normaliser, normalisers)):
        for name, row in eval("{" + code + "}", dict(vars(module_of))).items():
            monkeypatch.setitem(table, name, row)
    new_reads = {}
    exec(read, {**vars(reads), "READS": new_reads})
    for name, function in new_reads.items():
        monkeypatch.setitem(READS, name, function)
    for code in (preset, rooted, alone):
        for name, entry in eval("{" + code + "}", dict(vars(presets))).items():
            monkeypatch.setitem(presets.MIXERS, name, entry)
    written = types.ModuleType("subquad.linearize.mixers.mean_value")
    exec(module, written.__dict__)
    monkeypatch.setitem(sys.modules, written.__name__, written)
    monkeypatch.setitem(mixers.CLASSES, "mean_value", f"{written.__name__}:MeanValue")


def test_page_has_the_blocks_the_test_takes():
    assert [kind for kind, _ in blocks()] == ["", "row", "row", "writes", "reads", "normalisers", "row", "file", "row"]


def rooted_by_hand(mixer, call) -> torch.Tensor:
    """sum_j w_tj beta_j v_j / sqrt(sum_j w_tj) over the tokens older than the window, mixed with the window by the cell's gate."""
    t, j = torch.arange(50)[:, None], torch.arange(50)[None]
    older = (j <= t - mixer.window) & (j >= mixer.sinks)
    w, beta = weights_of(mixer, call, older), torch.sigmoid(mixer.beta(call.hidden_BTD))
    linear = torch.einsum("bgrtj,bjgv->btgrv", w / w.sum(-1, keepdim=True).clamp_min(EPS).sqrt(), call.v_BTGV * beta)
    share = (torch.sigmoid(mixer.mix(call.hidden_BTD)) * older.any(1)[None, :, None, None]).unsqueeze(-1)
    return torch.lerp(mixers.build("window", mixer.shape, mixer.window, mixer.sinks)(part(call)), linear, share)


@pytest.mark.parametrize("name", ["squared", "rooted", "mean_value"])
def test_what_the_page_adds_works(added, name):
    torch.manual_seed(0)
    mixer, call = mixers.build(name, HeadShape(D, G, R, K, V), 6, 2), call_of(50)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        whole = mixer(call)
        for cuts in ([50], [3, 20, 21, 44, 50], list(range(1, 51))):
            out, state = run(mixer, call, cuts)
            assert_near(out, whole, MIXER, str(cuts))
        assert state.memory[0].numel() * 4 == mixer.memory_bytes(mixer.shape, **mixers.pieces(name))
    if name == "squared":
        assert_near(whole, definition(mixer, call), MIXER)
    elif name == "rooted":
        assert_near(whole, rooted_by_hand(mixer, call), MIXER)
    else:
        mean = call.v_BTGV.cumsum(1) / torch.arange(1, 51)[:, None, None]
        window = mixers.build("window", mixer.shape, 6, 2)(part(call))
        assert_near(whole, (window + mean.unsqueeze(3)) / 2, MIXER)
