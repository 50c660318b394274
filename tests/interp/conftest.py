"""These tests need a process of their own (see emulator.py): tests/test_triton.py starts it. Elsewhere nothing here is collected."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    sys.path.insert(0, str(HERE.parent))
    import light_package

    light_package.install(HERE)
    import emulator
    import torch

    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def watched():
        """Every test runs on NaN-filled buffers, with bounds and races checked."""
        torch.manual_seed(0)
        with emulator.poisoned(), emulator.watch():
            yield
