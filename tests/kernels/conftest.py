"""Fixtures of the kernel tests."""

import pytest

from subquad.kernels import dispatch
from subquad.kernels.cpu import build


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
