"""These tests need a process of their own (see compiler.py): tests/test_triton.py starts it. Elsewhere nothing here is collected."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
if os.environ.get("SUBQUAD_AOT") != "1":
    collect_ignore_glob = ["*"]
else:
    sys.path.insert(0, str(HERE.parent))
    import light_package

    light_package.install(HERE)
