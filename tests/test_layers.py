"""A file imports to its right only: cli -> run -> recipe -> {linearize | distill | evals} -> kernels."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "subquad"
ANYONE = {"errors", "registry", "settings"}  # these know nothing of the rest

# What a file or folder of the package may import, besides itself and ANYONE.
BELOW = {
    "errors": set(),
    "registry": {"errors"},
    "settings": {"errors", "registry"},
    "kernels": set(),
    "linearize": {"kernels"},
    "distill": set(),
    "evals": set(),
    "recipes": set(),
}
PARTS = {"linearize", "distill", "evals"}
BELOW["recipe"] = PARTS
BELOW["folder"] = set()
BELOW["progress"] = {"folder"}
BELOW["smoke"] = {"linearize", "recipe"}
BELOW["inputs"] = {"recipe", "smoke"} | PARTS
BELOW["healing"] = {"progress"} | PARTS
BELOW["selection"] = {"healing", "progress", "recipe"} | PARTS
BELOW["doctor"] = {"kernels"}
BELOW["talk"] = {"inputs"} | PARTS
BELOW["verbs"] = {"folder", "healing", "progress", "recipe"} | PARTS
BELOW["leakage"] = PARTS
BELOW["scratch"] = {"progress"} | PARTS
BELOW["judging"] = {"folder", "leakage", "progress", "verbs"} | PARTS
BELOW["ablation"] = {"linearize"}
BELOW["diagnosis"] = {"ablation", "folder", "progress", "verbs"} | PARTS
BELOW["report"] = {"folder", "recipe"} | PARTS
BELOW["run"] = set(BELOW) - {"cli"}
BELOW["cli"] = set(BELOW)
BELOW["__main__"] = {"cli"}
BELOW["__init__"] = {"linearize", "distill", "verbs"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Parts of subquad that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "subquad":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subquad."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("subquad.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_to_the_right(path):
    part = part_of(path)
    assert part in BELOW, f"say in BELOW what {part} may import"
    wrong = imported(path) - BELOW[part] - {part} - (ANYONE if part not in ANYONE else set())
    assert not wrong, f"{path.name} ({part}) must not import {', '.join(sorted(wrong))}"


def test_no_relative_imports_across_parts():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path}: write subquad.… so that the direction can be read"


def test_kernels_know_tensors_only():
    for path in FILES:
        if part_of(path) == "kernels":
            assert "import transformers" not in (text := path.read_text(encoding="utf-8")) and "from transformers" not in text


def test_readme_prints_every_file():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("## The tree") :]
    assert not [str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py" and path.name not in tree]
