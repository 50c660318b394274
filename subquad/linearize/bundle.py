"""Write the code that a student folder needs to load without the package: flat copies of student.py and everything it imports.

`trust_remote_code` copies sibling files with `from .x import y` only, so `subquad.a.b` becomes the file `subquad_a_b.py`, imports are rewritten
to it, and so are the "module:attribute" rows of our tables. The copies are the same text otherwise: one implementation, two ways in.
"""

import ast
import re
from importlib import resources
from pathlib import Path

ENTRY = "subquad.linearize.student"
FILE = "modeling_subquad.py"
# Needs a package that a student folder must not ask for; without it the ops run on torch or C++ (kernels/dispatch.py).
LEFT_OUT = "subquad.kernels.triton"
_ROW = re.compile(r'"(subquad(?:\.\w+)+):(\w+)"')


def write(folder: str | Path) -> None:
    """Put the flat copies into `folder`."""
    for name, text in files().items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def files() -> dict[str, str]:
    """File name -> text of everything a student needs."""
    texts: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module in texts:
            continue
        text = _source(module)
        texts[module] = text
        waiting += _imports(text) + [row for row, _ in _ROW.findall(text) if not row.startswith(LEFT_OUT)]
    flat = {_flat(module) + ".py": _rewrite(text) for module, text in sorted(texts.items())}
    everything = "\n".join(f"from . import {_flat(module)}  # noqa: F401" for module in sorted(texts))
    named = "\n".join(f"from .{_flat(module)} import __name__ as _{i}  # noqa: F401" for i, module in enumerate(sorted(texts)))
    flat[FILE] = (
        '"""Loads this student with trust_remote_code=True. With the subquad package installed, `import subquad` is enough."""\n\n'
        f"# transformers copies only files that are imported by name; `named` makes it see the ones our tables look up later.\n{named}\n{everything}\n"
        f"from .{_flat(ENTRY)} import SubquadConfig, SubquadForCausalLM  # noqa: F401\n"
    )
    return flat


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    folder = resources.files(package)
    direct = folder / f"{name}.py"
    return (direct if direct.is_file() else folder / name / "__init__.py").read_text(encoding="utf-8")


def _imports(text: str) -> list[str]:
    found = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
    return [module for module in found if module.startswith("subquad.")]


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _rewrite(text: str) -> str:
    text = re.sub(r"^(\s*)from (subquad(?:\.\w+)+) import", lambda m: f"{m[1]}from .{_flat(m[2])} import", text, flags=re.M)
    return _ROW.sub(lambda m: f'".{_flat(m[1])}:{m[2]}"', text)
