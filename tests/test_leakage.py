"""Overlap of training text and evaluation text: found whatever the markup, reported with hashes, refused unless allowed."""

import json

import helpers
import pytest
from helpers import tiny_recipe, write_recipe

from subquad import leakage, run
from subquad.distill.data import Document
from subquad.errors import UserError
from subquad.recipe import load_recipe

QUESTION = "Which of these rivers runs through the old town, past the mill and on to the northern sea"


def test_copy_is_found_and_chance_is_not():
    train = [helpers.words(300), f"# Quiz\n\n* {QUESTION.upper()}?\n", helpers.words(300, 1)]
    found = {
        entry["set"]: entry for entry in leakage.overlap(train, {"quiz": [QUESTION, helpers.words(40, 7)], "other": [helpers.words(40, 8)]})
    }
    assert found["quiz"]["overlapping_items"] == 1 and 0 < found["quiz"]["share"] < 1
    assert found["other"]["share"] == 0 and found["other"]["sha256"] == leakage.sha256([helpers.words(40, 8)])


def test_short_texts_are_compared_whole():
    short = "nine words that nobody would write twice by chance"
    assert leakage.overlap([f"before {short} after"], {"s": [short]})[0]["share"] == 1
    assert leakage.overlap([f"before {short[:-2]} after"], {"s": [short]})[0]["share"] == 0
    assert leakage.overlap(["a b"], {"s": ["too short"]})[0]["share"] == 0


def test_guard_reads_the_files_of_tasks(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text(json.dumps({"query": QUESTION, "choices": ["the Blue", "the Long"], "gold": 1}))
    tasks = {"choice": {"files": [str(path)]}, "perplexity": {}}
    train = [Document("t", f"{QUESTION} the Long")]
    with pytest.raises(UserError, match=r"100.0% of the runs of 13 words in quiz \(1 of 1 texts\).*data.allow_overlap"):
        leakage.guard(train, [], tasks, allow=False)
    assert leakage.guard(train, [], tasks, allow=True)[0]["share"] == 1
    assert leakage.guard([Document("t", helpers.words(99))], [], tasks, allow=False)[0]["share"] == 0


def test_recipe_that_judges_on_its_training_text_is_refused(tmp_path, teacher_folder, text_file):
    data = {"train": str(text_file), "eval": str(text_file)}
    recipe = load_recipe(write_recipe(tmp_path / "mine.yaml", tiny_recipe(teacher_folder, text_file, data=data)))
    with pytest.raises(UserError, match=r"held-out text .* stand in the training text"):
        run.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_allowed_overlap_is_written_down(tmp_path, teacher_folder, text_file):
    data = {"train": str(text_file), "eval": str(text_file), "allow_overlap": True}
    changes = {"select": None, "budget": None, "stages": [], "sample": None, "data": data}
    recipe = load_recipe(write_recipe(tmp_path / "mine.yaml", tiny_recipe(teacher_folder, text_file, **changes)))
    assert "allow_overlap: true" in recipe.dump()
    run.run(recipe, tmp_path / "out")
    story = json.loads((tmp_path / "out" / "student" / "config.json").read_text())["provenance"]
    assert story["overlap"][0]["set"] == "held-out text" and story["overlap"][0]["share"] == 1 and len(story["overlap"][0]["sha256"]) == 64
