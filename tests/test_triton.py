"""The Triton tests, each in a process of its own: the interpreter and the compiler cannot share one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(folder: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--confcutdir={HERE / folder}", str(HERE / folder)]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=kept | environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
def test_interpreter():
    run("interp", TRITON_INTERPRET="1")


@needs_triton
def test_ahead_of_time():
    run("aot", SUBQUAD_AOT="1")


def test_the_package_needs_no_triton():
    """Importing the package and its ops loads no kernel, and works where triton cannot be imported."""
    code = "import sys; sys.modules['triton'] = None; import subquad, subquad.kernels.ops; sys.exit(any('kernels.triton' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent).returncode == 0
