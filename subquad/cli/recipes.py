"""`subquad recipes ...`."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.shared import Json, Sets, command, recipes_app, show
from subquad.errors import UserError


@command(recipes_app, "ls")
def recipes_ls(json: Json = False) -> None:
    """Names and one line each."""
    from subquad.recipe import load_recipe, shipped

    rows = [{"name": name, "about": load_recipe(name).about} for name in shipped()]
    if json:
        return show(rows)
    for row in rows:
        print(f"{row['name']:32} {row['about']}")


@command(recipes_app, "show")
def recipes_show(recipe: str, sets: Sets = None, json: Json = False) -> None:
    """The resolved recipe: parents merged, variables and defaults filled in."""
    from subquad.recipe import load_recipe

    loaded = load_recipe(recipe, sets)
    show(loaded.to_dict()) if json else print(loaded.dump(), end="")


@command(recipes_app, "copy")
def recipes_copy(recipe: str, to: Annotated[Path, typer.Argument(help="The YAML file to write.")]) -> None:
    """A resolved copy to change and run."""
    from subquad.folder import check_folder, write_text
    from subquad.recipe import load_recipe

    if to.exists():
        raise UserError(f"{to} exists already; choose another name.")
    check_folder(to.parent)
    text = load_recipe(recipe).dump()
    to.parent.mkdir(parents=True, exist_ok=True)
    write_text(to, text)
    print(f"Run it with: subquad run {to}")


@command(recipes_app, "schema")
def recipes_schema() -> None:
    """JSON schema of a recipe, for editors."""
    from subquad.recipe import Recipe

    show(Recipe.model_json_schema())
