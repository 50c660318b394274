"""`subquad` without its `__init__`, for processes that need the kernels only: they import nothing of the package but each other, and `__init__` would
bring in transformers, which takes longer than the tests.
"""

import sys
import types
from pathlib import Path


def install(*folders: Path) -> None:
    """Put a bare `subquad` into sys.modules, and `folders` and this one at the front of the import path."""
    here = Path(__file__).parent
    sys.path[:0] = [*map(str, folders), str(here)]
    package = types.ModuleType("subquad")
    package.__path__ = [str(here.parent / "subquad")]
    sys.modules.setdefault("subquad", package)
