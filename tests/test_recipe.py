"""Recipes: what is read, what is refused, and that one look at the message is enough to mend it."""

import pytest
from helpers import write_recipe

from subquad.errors import UserError
from subquad.recipe import Recipe, find_recipe, load_recipe, shipped
from subquad.settings import apply_sets, expand, merge, parse_yaml

STAGE = {"name": "heal", "train": "attention", "inputs": "own", "losses": {"kl": 1.0}, "tokens": "20k", "context": 512, "lr": 1e-4}
GOOD = {"teacher": "tiny", "stages": [STAGE]}


def load(tmp_path, recipe, sets=()):
    return load_recipe(write_recipe(tmp_path / "mine.yaml", recipe), list(sets))


def problems(tmp_path, recipe, sets=()):
    with pytest.raises(UserError) as caught:
        load(tmp_path, recipe, sets)
    return caught.value.problems


# ---- YAML --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("-2E5", -2e5), ("1.5e+3", 1500.0), ("3", 3), ("1e", "1e"), ("e4", "e4"), ("yes", True)]
)
def test_numbers(text, value):
    assert parse_yaml(text, "here") == value and type(parse_yaml(text, "here")) is type(value)


def test_key_written_twice_is_an_error():
    with pytest.raises(UserError, match=r"here, line 2, column 1: .*'a' is written twice"):
        parse_yaml("a: 1\na: 2\n", "here")


def test_broken_yaml_names_the_place():
    with pytest.raises(UserError, match=r"here, line 2"):
        parse_yaml("a: 1\n  b: [\n", "here")


def test_merge_goes_into_mappings_and_replaces_lists():
    assert merge({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [4]}) == {"a": {"b": 1, "c": 3}, "d": [4]}


def test_sets():
    data = {"stages": [{"lr": 1.0}], "plan": {"exact": {0: [1]}}}
    changed = apply_sets(data, ["stages.0.lr=1e-3", "plan.exact.0=[2]", "seed=3", "budget.at=8"])
    assert changed == {"stages": [{"lr": 1e-3}], "plan": {"exact": {0: [2]}}, "seed": 3, "budget": {"at": 8}}
    assert data["stages"][0]["lr"] == 1.0


def test_all_bad_sets_at_once():
    with pytest.raises(UserError) as caught:
        apply_sets({"stages": [{}]}, ["no-equals", "stages.1.lr=1", "stages.x=1", "a=[1", "teacher.x=1"])
    assert len(caught.value.problems) == 4 and "list of 1" in caught.value.problems[1]


def test_variables(monkeypatch):
    monkeypatch.setenv("SET", "here")
    assert expand({"a": ["${SET}/x", "${UNSET:-there}/y", "${UNSET:-}z"]}) == {"a": ["here/x", "there/y", "z"]}
    with pytest.raises(UserError) as caught:
        expand(["${ONE_UNSET}", "${TWO_UNSET}"])
    assert len(caught.value.problems) == 2


# ---- schema ------------------------------------------------------------------------------------------------------------------------


def test_a_key_with_brackets_is_unknown(tmp_path):
    with pytest.raises(UserError, match=r"stages\[0\]: no such key\..*Allowed here"):
        load(tmp_path, GOOD, ["stages[0].context=2048"])


def test_good_recipe(tmp_path):
    recipe = load(tmp_path, GOOD, ["stages.0.lr=5e-5"])
    assert recipe.name == "mine" and recipe.stages[0].tokens == 20_000 and recipe.stages[0].lr == 5e-5


def test_dump_loads_to_the_same(tmp_path):
    recipe = load(tmp_path, {**GOOD, "plan": {"exact": {0: [1], 2: [0, 1]}}, "evals": {"perplexity": {}}})
    (tmp_path / "again.yaml").write_text(recipe.dump(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_every_problem_with_its_path_at_once(tmp_path):
    bad = {
        "teacher": "tiny",
        "plan": {"mixer": "windwo", "window": 0, "sinks": True},
        "stages": [{**STAGE, "lrr": 1}, {**STAGE, "name": "b", "train": "everything"}],
        "dtpye": "float32",
        "evals": {"perplexty": {}, "perplexity": {"contxt": 3}},
    }
    found = "\n".join(problems(tmp_path, bad))
    for part in [
        "plan.mixer: Unknown mixer 'windwo'. Did you mean 'window'?",
        "plan.window:",
        "plan.sinks:",
        "stages.0.lrr: no such key. Did you mean 'lr'?",
        "stages.1.train:",
        "dtpye: no such key. Did you mean 'dtype'?",
        "perplexty",
        "perplexity.contxt: no such setting. Did you mean 'context'?",
    ]:
        assert part in found, f"{part!r} is missing from:\n{found}"
    assert not any(word in found for word in ("pydantic", "input_value", "errors.pydantic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "teacher"),
        ({"select": {"method": "gates"}}, "needs a budget"),
        ({"select": {"method": "list"}}, "heads"),
        ({"select": {"method": "gates", "tokens": 512}, "budget": {}}, "select: tokens: 512 is less than one step"),
        ({"select": {"method": "gates", "context": 33}, "budget": {}}, "select: repeat puts a passage of half the context twice"),
        ({"select": {"method": "uniform"}, "budget": {}, "plan": {"exact": [0]}}, "one of them"),
        ({"stages": [STAGE, STAGE]}, "two stages are called 'heal'"),
        ({"budget": {"kv_bytes": 20}}, "budget.kv_bytes"),
        ({"evals": {"perplexity": {"windows": "abc"}}}, "perplexity.windows: expected a whole number or null, got 'abc'"),
        ({"evals": {"passkey": {"samples": 1.5}}}, "passkey.samples: expected a whole number, got 1.5"),
        ({"evals": {"mqar": {"queries": True}}}, "mqar.queries: expected a whole number, got True"),
        ({"budget": {"at": True}}, "budget.at"),
        ({"data": {"hold_out": 1.5}}, "data.hold_out"),
        ({"plan": {"options": {"decay": "none"}}}, "options.decay"),
        (
            {"stages": [STAGE, {**STAGE, "name": "t", "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1}}]},
            "put it before",
        ),
    ],
)
def test_refused(tmp_path, change, message):
    assert message in "\n".join(problems(tmp_path, {**GOOD, **change}))


# ---- names and parents ---------------------------------------------------------------------------------------------------------------


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        find_recipe("quikstart")
    with pytest.raises(UserError, match=r"No recipe file nowhere\.yaml"):
        find_recipe("nowhere.yaml")


def test_extends(tmp_path):
    write_recipe(tmp_path / "parent.yaml", {**GOOD, "plan": {"window": 32, "sinks": 1}, "evals": {"perplexity": {}, "repeat": {}}})
    recipe = load(tmp_path, {"extends": "parent.yaml", "plan": {"window": 16}, "evals": {"repeat": None}})
    assert (recipe.plan.window, recipe.plan.sinks, recipe.name, list(recipe.evals.root)) == (16, 1, "mine", ["perplexity"])


def test_extends_a_shipped_name(tmp_path):
    assert load(tmp_path, {"extends": "quickstart", "seed": 3}).teacher == load_recipe("quickstart").teacher


def test_extends_in_a_circle(tmp_path):
    write_recipe(tmp_path / "a.yaml", {"extends": "mine.yaml"})
    assert "extends itself" in problems(tmp_path, {"extends": "a.yaml"})[0]


def test_schema_is_json():
    assert Recipe.model_json_schema()["additionalProperties"] is False
    assert "quickstart" in shipped()
