"""The grid of kernels/grid.py has what it says, and the quickest of its rows hold on the backends that run in this process."""

import itertools

import pytest
from kernels import grid
from kernels.test_ops import backend, compare  # noqa: F401 - a fixture

from subquad.kernels import ops

PAIRS = grid.pairs()


@pytest.mark.parametrize("name", grid.KINDS)
def test_every_two_values_meet(name):
    op = name.split()[-1]
    rows = [row for row in PAIRS if row.op == op and row.kind in grid.KINDS[name]]
    values = {"kind": grid.KINDS[name], "T": grid.LENGTHS, "D": grid.SIZES, "R": grid.GROUPS, "other": (False, True), "packed": (False, True)}
    values |= {} if op == "banded" else {"state": (False, True)}
    met = {pair for row in rows for pair in grid.columns(row)}
    wanted = {
        ((a, x), (b, y)) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]
        if not ((a, x) == ("kind", "given") and (b, y) == ("packed", True))
    }  # fmt: skip
    assert not wanted - met
    assert {(row.kind, row.T, row.D) for row in grid.grid() if row.op == op and row.kind in grid.KINDS[name]} == set(
        itertools.product(grid.KINDS[name], grid.LENGTHS, grid.SIZES)
    )


@pytest.mark.parametrize("row", [row for row in PAIRS if row.T in (31, 77)], ids=str)
def test_rows(row, backend):  # noqa: F811
    leaves, other = grid.tensors(row)
    compare(getattr(ops, row.op), leaves, other, backend)
