"""Fixtures of the kernel tests."""

import pytest

from subquad.kernels import dispatch
from subquad.kernels.cpu import build
from subquad.kernels.cpu.quick import quick as quick_function


@pytest.fixture(params=["avx2", "portable"])
def other_isa(request, monkeypatch):
    """The C++ compiled for smaller vectors, for as long as the test runs; skipped where this machine has no such vectors or no compiler."""
    if isinstance(build.library(), str) or (request.param == "avx2" and build.isa() == "portable"):
        pytest.skip("not on this machine")
    monkeypatch.setenv("SUBQUAD_CPU_ISA", request.param)
    monkeypatch.setattr(dispatch, "_quick", {})
    build.library.cache_clear()
    yield request.param
    build.library.cache_clear()


@pytest.fixture
def quick():
    """The functions by op, as `auto` finds them after its first call; skipped without C++ or torch's exchange table."""
    found = {op: run for op in dispatch.OPS if (run := quick_function(op)) is not None}
    if not found:
        pytest.skip("no C++ or no exchange table here")
    return found
