"""Levels around a state: many tokens at once from states of earlier ones are the same tokens one by one, also beyond the level that keeps the rest.

Key: as in levels.py.
"""

from itertools import pairwise

import pytest
import torch
from tolerances import MIXER, assert_near

from subquad.linearize.mixers.level_blocks import read_block, together
from subquad.linearize.mixers.levels import LEVELS, read_steps

B, T, G, R, F, V = 2, 1100, 1, 2, 4, 3
CUTS = [0, 5, 6, 8, 64, 128, 131, 510, 514, 1000, 1023, 1026, T]  # inside blocks, at their ends, across the largest


@pytest.mark.parametrize("rule", ["sums", "scalar decay", "vector decay", "delta"])
@torch.no_grad()
def test_blocks_of_tokens_are_their_steps(rule):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, *size, generator=generator) for size in ((G, R, F), (G, F), (G, V)))
    beta, weight = torch.rand(B, T, G, generator=generator), torch.rand(B, T, G, R, LEVELS, generator=generator)
    log = -torch.rand(B, T, G, *((F,) if rule == "vector decay" else ()), generator=generator) / 100
    given = [q, torch.nn.functional.normalize(k, dim=-1), v, None if rule == "sums" else log, weight, torch.ones(B, T, dtype=torch.bool)]
    beta = beta if rule == "delta" else None
    part = lambda x, a, b: None if x is None else x[:, a:b]  # noqa: E731
    states, written = torch.zeros(B, LEVELS, G, F, V), torch.zeros(B, dtype=torch.long)
    for a, b in pairwise(CUTS):
        now, own = [part(x, a, b) for x in given], part(beta, a, b)
        y, end, count = read_block(*now, states, (a, 0), own)
        wanted, states, written = read_steps(*now, states, written, own)
        assert_near(y, wanted, MIXER, f"tokens {a} to {b}")
        assert_near(end, states, MIXER, f"states after {b}")
        assert count.tolist() == written.tolist() == [b] * B


def test_rows_go_together_where_they_agree():
    on, none = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    assert together(on, none + 7) == (7, 0)
    assert together(on[:, :1], none) is None, "a decode step"
    assert together(on, torch.tensor([7, 8])) is None
    late = on.clone()
    late[:, :2] = False
    assert together(late, none) == (0, 2)
    late[1, 3:] = False  # filler behind the last token
    assert together(late, none) == (0, 2)
    late[1, 2] = False  # a row without a token, then one that starts later
    assert together(late, none) == (0, 2)
    late[1, 4:] = True
    assert together(late, none) is None
    assert together(~on, none) is None
