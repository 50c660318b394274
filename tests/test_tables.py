"""Every row of every table leads to something, and every shipped recipe is complete."""

import importlib
from pathlib import Path

import pytest

from subquad.distill.losses import ATTENTION_LOSSES, LOGIT_LOSSES
from subquad.evals import TASKS
from subquad.linearize.mixers import CLASSES, MIXERS, mixer_class, pieces
from subquad.recipe import Recipe, load_recipe, shipped
from subquad.smoke import shrink_recipe

TABLES = {"attention losses": ATTENTION_LOSSES, "logit losses": LOGIT_LOSSES, "eval tasks": TASKS, "mixer classes": CLASSES}
ROWS = [(table, name, row) for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("table", "name", "row"), ROWS, ids=[f"{table}-{name}" for table, name, _ in ROWS])
def test_row_resolves(table, name, row):
    module, _, attribute = row.partition(":")
    assert module.startswith("subquad.") and callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("name", MIXERS)
def test_preset_is_complete(name):
    assert MIXERS[name].about and MIXERS[name].seeds
    assert mixer_class(name) and isinstance(pieces(name), dict)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.about and recipe.evals.root
    copied = tmp_path / f"{name}.yaml"
    copied.write_text(recipe.dump(), encoding="utf-8")
    assert load_recipe(copied) == recipe, "the resolved recipe must say everything"
    assert isinstance(shrink_recipe(recipe), Recipe)


def test_shipped_recipes_have_a_row_in_the_readme():
    readme = next(iter(shipped().values())).with_name("README.md").read_text(encoding="utf-8")
    assert not [name for name in shipped() if f"| `{name}` |" not in readme]


def test_presets_have_a_row_in_the_papers():
    papers = (Path(__file__).parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
    assert not [name for name, preset in MIXERS.items() if f"| `{name}` | {preset.paper}" not in papers]
