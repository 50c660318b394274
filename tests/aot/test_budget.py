"""What the compilers make of the kernels: bars that hold for everything, and the committed budget. `make test` compiles a little, `make kernels` all of it."""

import os

import budget
import pytest
from cases import CASES, NO_MATRIX
from compiler import SHARED_LIMIT, TARGETS

BUDGET = budget.load()
QUICK = [("sm_80", "additive-scalar-64")]
RUN = [(target, case) for target in TARGETS for case in CASES] if os.environ.get("SUBQUAD_AOT_ALL") == "1" else QUICK
SEEN: dict = {}


@pytest.mark.parametrize(("target", "case"), RUN, ids=["-".join(pair) for pair in RUN])
def test_compiled(target, case):
    """Nothing spills, shared memory fits, products are on matrix units; and where a budget is kept, nothing grew."""
    found = budget.measure(target, case, SEEN)
    assert found
    for name, row in found.items():
        assert row["spill"] == 0 and row["shared"] <= SHARED_LIMIT[target], (name, row)
        assert row["matrix"] or name.split("[")[0] in NO_MATRIX, (name, row)
    allowed = BUDGET.get(target, {}).get(case)
    if allowed is not None:
        assert found.keys() == allowed.keys(), "kernels or their options changed: run tests/aot/budget.py and look at the difference"
        for name, row in found.items():
            assert not grew(row, allowed[name]), (name, row, allowed[name])


def grew(row: dict, was: dict) -> list[str]:
    """The figures that are worse than in the budget; a tenth of registers and instructions is left to the compiler."""
    worse = [key for key in ("spill", "shared") if row[key] > was[key]]
    worse += [key for key in ("registers", "instructions") if row[key] > 1.1 * was[key]]
    return worse + (["matrix"] if row["matrix"] < 0.9 * was["matrix"] or row["matrix_kind"] != was["matrix_kind"] else [])


def test_growth_is_seen():
    was = {"spill": 0, "shared": 1000, "registers": 100, "instructions": 1000, "matrix": 50, "matrix_kind": "HMMA"}
    assert not grew(was, was) and grew(was | {"spill": 4, "matrix_kind": ""}, was) == ["spill", "matrix"]
    assert grew(was | {"registers": 120, "shared": 1001}, was) == ["shared", "registers"]
