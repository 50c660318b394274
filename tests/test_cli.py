"""The command line as a user meets it: what goes to standard output, what --json prints, which exit code."""

import json

import pytest
from helpers import tiny_recipe, write_recipe
from typer.testing import CliRunner

from subquad.cli import app, parse_exact
from subquad.errors import UserError
from subquad.linearize.mixers import MIXERS
from subquad.recipe import shipped


@pytest.fixture
def cli():
    """call(*words) -> result with exit_code, stdout, stderr."""
    runner = CliRunner()
    return lambda *words, **more: runner.invoke(app, [str(word) for word in words], **more)


def ok(result):
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.mark.parametrize("words", [[], ["plan"], ["linearize"], ["distill"], ["run"], ["eval"], ["chat"], ["recipes", "show"]])
def test_help(cli, words):
    assert "Usage" in ok(cli(*words, "--help")).stdout


def test_recipes(cli, tmp_path):
    assert [row["name"] for row in json.loads(ok(cli("recipes", "ls", "--json")).stdout)] == list(shipped())
    assert "quickstart" in ok(cli("recipes", "ls")).stdout
    assert "kv_bytes: 0.3" in ok(cli("recipes", "show", "quickstart", "--set", "budget.kv_bytes=0.3")).stdout
    assert json.loads(ok(cli("recipes", "schema")).stdout)["title"] == "Recipe"
    copied = tmp_path / "mine.yaml"
    ok(cli("recipes", "copy", "quickstart", copied))
    assert cli("recipes", "copy", "quickstart", copied).exit_code == 2
    assert json.loads(ok(cli("recipes", "show", copied, "--json")).stdout)["teacher"] == "smollm2-135m"


# Rows of the table of systems that decoders' presets must cover between them; encoders' rows stand in ENCODERS.
DECODERS = """A01 A02 A03 A04 A05 A06 A07 A08 A09 A10 A11 A12 A13 A14 A15 A17 A19 A21 A26 B01 B02 B03 B04 B06 B07 B08 B09 B11 B13 B15 C01 C02 C03 C04 C05
C08 D01 D02 D03 D06 D07 D09 E01 E02 E04 E05 E06 E08 E09 E14 E15 J01""".split()
ENCODERS = "A01 A02 A03 A04 A05 A06 A07 A08 A10 A11 A12 A13 A22 A23 A25 B10".split()


def test_mixers(cli, teacher_folder):
    rows = json.loads(ok(cli("mixers", "--json")).stdout)
    for direction, wanted in (("causal", DECODERS), ("bidirectional", ENCODERS)):
        covered = {seed for row in rows if direction in row["directions"] for seed in row["seeds"]}
        assert not set(wanted) - covered, direction
    assert [row["name"] for row in rows] == list(MIXERS) and all(name in ok(cli("mixers")).stdout for name in MIXERS)
    text = ok(cli("mixers", "nha", "--model", str(teacher_folder), "--window", "8")).stdout
    assert "K~" in text and "Native Hybrid Attention" in text and "KV heads converted" in text
    for name in MIXERS:
        found = json.loads(ok(cli("mixers", name, "--json")).stdout)
        assert found["formula"] and found["paper"] and found["pieces"] == MIXERS[name].pieces
    assert "Did you mean 'gla'" in cli("mixers", "glaa").stderr


def test_plan_reads_the_config_only(cli, teacher_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    result = json.loads(ok(cli("plan", tmp_path, "--window", 8, "--exact", "0:1,2:0,2:1", "--json")).stdout)
    assert [layer["exact"] for layer in result["layers"]] == [[1], [], []]
    assert [layer["mixer"] for layer in result["layers"]] == ["window", "window", None]
    assert ok(cli("plan", tmp_path, "--mixer", "gla", "--set", "layers=[1]")).stdout


@pytest.mark.parametrize(("text", "exact"), [(None, None), ("0,15", [0, 15]), ("0:1,0:2,3:0", {0: [1, 2], 3: [0]})])
def test_exact(text, exact):
    assert parse_exact(text) == exact


@pytest.mark.parametrize("text", ["a", "0:1,2", "0:1:2", "0-3"])
def test_bad_exact(text):
    with pytest.raises(UserError, match="--exact"):
        parse_exact(text)


def test_linearize_distill_eval_chat(cli, teacher_folder, text_file, tmp_path):
    """Each verb on the folder the one before left."""
    first, second = tmp_path / "first", tmp_path / "second"
    ok(cli("linearize", teacher_folder, "--window", 8, "--sinks", 2, "--out", first))
    settings = ["tokens=128", "context=32", "lr=1e-3"]
    distill = ["distill", first, "--data", text_file, "--out", second, *(word for text in settings for word in ("--set", text))]
    assert json.loads(ok(cli(*distill, "--json")).stdout) == {"student": str(second / "student")}
    assert "finished" in ok(cli(*distill)).stdout
    task = ["--set", "perplexity={context: 32, windows: 2}"]
    rows = json.loads(ok(cli("eval", second / "student", "--data", text_file, *task, "--json")).stdout)
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["teacher", "window", "student"]
    assert ok(cli("eval", first, "--data", text_file, "--teacher", teacher_folder, *task)).stdout
    (turn,) = json.loads(ok(cli("chat", second / "student", "--prompt", "river", "--new-tokens", 3, "--json")).stdout)
    assert turn["prompt"] == "river"
    ok(cli("chat", teacher_folder, "--new-tokens", 2, input="river\n\n"))
    assert "differs in: teacher, teacher_weights" in cli(*distill, "--teacher", teacher_folder).stderr
    ok(cli("linearize", teacher_folder, "--window", 20, "--out", first, "--overwrite"))
    assert "differs in: student_weights" in cli(*distill).stderr


def test_run_and_run_again(cli, teacher_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "mine.yaml", tiny_recipe(teacher_folder, text_file))
    out = tmp_path / "run"
    first = json.loads(ok(cli("run", recipe, "--out", out, "--json")).stdout)
    assert first["rows"] == json.loads((out / "results.json").read_text())
    assert json.loads(ok(cli("run", recipe, "--out", out, "--json")).stdout) == first
    assert cli("run", recipe, "--out", out, "--set", "seed=1").exit_code == 2
    ok(cli("run", recipe, "--out", out, "--set", "seed=1", "--overwrite"))
