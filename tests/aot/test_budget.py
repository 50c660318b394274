"""Compiled figures against the committed budget. The quick part runs in `make test`, everything in `make kernels` (SUBQUAD_AOT_ALL=1)."""

import os

import budget
import pytest
from cases import CASES, NO_MATRIX
from compiler import SHARED_LIMIT

BUDGET = budget.load()
EVERYTHING = [(target, case) for target in BUDGET for case in BUDGET[target]]
QUICK = [(target, "window_linear-none-64") for target in BUDGET]
RUN = EVERYTHING if os.environ.get("SUBQUAD_AOT_ALL") == "1" else QUICK
SEEN: dict = {}


@pytest.mark.parametrize(("target", "case"), RUN, ids=["-".join(pair) for pair in RUN])
def test_nothing_grew(target, case):
    """No more spills, shared memory or registers than the budget says, and no matrix instruction lost; a tenth of the instructions is left to the compiler."""
    found, allowed = budget.measure(target, case, SEEN), BUDGET[target][case]
    assert found.keys() == allowed.keys(), "kernels or their options changed: run tests/aot/budget.py and look at the difference"
    for name, row in found.items():
        was = allowed[name]
        assert row["spill"] <= was["spill"] and row["shared"] <= was["shared"], (name, row, was)
        assert row["registers"] <= 1.1 * was["registers"] and row["instructions"] <= 1.1 * was["instructions"], (name, row, was)
        assert row["matrix"] >= 0.9 * was["matrix"] and row["matrix_kind"] == was["matrix_kind"], (name, row, was)


ROWS = [(target, case, name, row) for target, case in EVERYTHING for name, row in BUDGET[target][case].items()]


def test_matrix_instructions_in_every_matrix_kernel():
    without = [row[:3] for row in ROWS if not row[3]["matrix"] and row[2].split("[")[0] not in NO_MATRIX]
    assert not without


def test_shared_memory_fits():
    assert not [row[:3] for row in ROWS if row[3]["shared"] > SHARED_LIMIT[row[0]]]


def test_budget_names_cases_that_exist():
    assert ROWS and not {case for _, case in EVERYTHING} - set(CASES)
