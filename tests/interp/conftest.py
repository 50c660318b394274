"""These tests need a process of their own (see emulator.py): tests/test_triton.py starts it. Elsewhere nothing here is collected."""

import os
import sys
import types
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    # Kernels import nothing of the package but each other; its __init__ would bring in transformers, which takes longer than the tests.
    package = types.ModuleType("subquad")
    package.__path__ = [str(HERE.parents[1] / "subquad")]
    sys.modules.setdefault("subquad", package)
    import emulator
    import torch

    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def watched():
        """Every test runs on NaN-filled buffers, with bounds and races checked."""
        torch.manual_seed(0)
        with emulator.poisoned(), emulator.watch():
            yield
