"""These tests need a process of their own (see compiler.py): tests/test_triton.py starts it. Elsewhere nothing here is collected."""

import os
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
if os.environ.get("SUBQUAD_AOT") != "1":
    collect_ignore_glob = ["*"]
else:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    # Kernels import nothing of the package but each other; its __init__ would bring in transformers.
    package = types.ModuleType("subquad")
    package.__path__ = [str(HERE.parents[1] / "subquad")]
    sys.modules.setdefault("subquad", package)
