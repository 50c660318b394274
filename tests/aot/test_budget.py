"""What the compilers make of the kernels: bars that hold for everything, and the committed budget. `make test` compiles a little, `make kernels` all of it."""

import os

import budget
import pytest
from cases import CASES, NO_MATRIX
from stand_in import SHARED_LIMIT

BUDGET = budget.load()
QUICK = [("sm_80", "additive-scalar-64"), ("sm_90", "banded-64"), ("sm_90", "mapped-window_linear-none-64"), ("gfx942", "steps-64")]
KEPT_TARGETS = ("sm_80", "sm_90", "gfx942")  # the budget has every case on these
RUN = [(target, case) for case in CASES for target in KEPT_TARGETS] if os.environ.get("SUBQUAD_AOT_ALL") == "1" else QUICK
KEPT = [(target, case) for target, cases in BUDGET.items() for case in cases]
CONFIGURATIONS = 8  # of one op and shape, forward and backward together
SEEN: dict = {}


def ids(pairs):
    return ["-".join(pair) for pair in pairs]


def check_bars(target: str, case: str, rows: dict) -> None:
    """Nothing spills, shared memory fits, products are on matrix units, and few kernels are compiled."""
    assert rows
    for name, row in rows.items():
        assert row["spill"] == 0 and row["shared"] <= SHARED_LIMIT[target], (name, row)
        assert row["matrix"] or name.split("[")[0] in NO_MATRIX, (name, row)
    assert len({budget.configuration(name) for name in rows}) <= CONFIGURATIONS, list(rows)


@pytest.mark.parametrize(("target", "case"), RUN, ids=ids(RUN))
def test_compiled(target, case):
    """The bars hold, and nothing grew beyond the budget."""
    found = budget.measure(target, case, SEEN)
    check_bars(target, case, found)
    allowed = BUDGET.get(target, {}).get(case)
    if allowed is not None:
        assert found.keys() == allowed.keys(), "kernels or their options changed: run tests/aot/budget.py and look at the difference"
        for name, row in found.items():
            assert not grew(row, allowed[name]), (name, row, allowed[name])


@pytest.mark.parametrize(("target", "case"), KEPT, ids=ids(KEPT))
def test_budget_keeps_the_bars(target, case):
    check_bars(target, case, BUDGET[target][case])


def test_budget_is_complete():
    assert {(target, case) for target in KEPT_TARGETS for case in CASES} <= set(KEPT)


def grew(row: dict, was: dict) -> list[str]:
    """The figures that are worse than in the budget; a tenth of registers and instructions is left to the compiler."""
    worse = [key for key in ("spill", "shared") if row[key] > was[key]]
    worse += [key for key in ("registers", "instructions") if row[key] > 1.1 * was[key]]
    return worse + (["matrix"] if row["matrix"] < 0.9 * was["matrix"] or row["matrix_kind"] != was["matrix_kind"] else [])


def test_growth_is_seen():
    was = {"spill": 0, "shared": 1000, "registers": 100, "instructions": 1000, "matrix": 50, "matrix_kind": "mma.sync"}
    assert not grew(was, was) and grew(was | {"spill": 4, "matrix_kind": ""}, was) == ["spill", "matrix"]
    assert grew(was | {"registers": 120, "shared": 1001}, was) == ["shared", "registers"]
