"""Every preset in every form against its definition (forms.py): outputs, gradients and states. Small heads; real ones are dealt out.

All presets with all lengths, sizes and groups: `make mixers-grid`.
"""

import pytest
from linearize.forms import ALLOWED, FORMS, WITHOUT_STATE, Row, cases, errors, grid, never_infinite
from linearize.test_mixers import BOTH_WAYS, CASES

ALL = [*CASES, *BOTH_WAYS]


def check(row: Row) -> None:
    found = errors(row)
    assert set(found) == set(FORMS if row.causal else WITHOUT_STATE)
    for form, offs in found.items():
        for what, off in offs.items():
            allowed = ALLOWED[what.split()[0]]
            assert off <= allowed, f"{row}, {form}: {what} off by {off:.2e}, allowed {allowed:.0e}"


@pytest.mark.parametrize("case", ALL)
def test_every_form_is_the_definition(case):
    """23 and 9 tokens, 2 sinks and a window of 6: both sequences have tokens that are written."""
    check(Row(case, 23, 3, 8))


# Found by the grid: squares of scores that nearly cancel; a sum of gradients that nearly cancels, beyond a definition in fp32.
@pytest.mark.parametrize("row", [Row("power2", 64, 1, 64), Row("mamba2", 64, 3, 128)], ids=str)
def test_rows_that_failed_once(row):
    check(row)


def test_the_grid_is_whole():
    assert len({str(row) for row in grid()}) == len(cases()) * 5 * 3 * 3


@pytest.mark.parametrize("case", ALL)
def test_padding_and_large_logits_stay_finite(case):
    assert never_infinite(Row(case, 12, 3, 8), 30)
