"""A run from start to end on a tiny model: what it leaves, that it can be killed anywhere, and that it refuses before it works."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import helpers
import pytest
import torch
import yaml
from helpers import tiny_recipe, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import subquad
from subquad.distill.data import Tokens
from subquad.distill.log import timeless
from subquad.errors import UserError
from subquad.evals import TASKS
from subquad.folder import RunFolder, write_text
from subquad.inputs import Teacher, read_documents
from subquad.recipe import load_recipe, rewritten
from subquad.report.collect import collect
from subquad.run import run
from subquad.selection import choose_heads
from subquad.smoke import shrink_config, shrink_model, shrink_recipe
from subquad.verbs import check_tasks

TRANSFER = {"name": "transfer", "train": "mixers", "inputs": "teacher", "losses": {"attention_output": 1.0}, "tokens": 256, "context": 32}
TRANSFER["lr"] = 1e-2
RECALL = [name for name, row in TASKS.items() if ".recall." in row]
LORA = {"name": "lora", "train": "lora", "inputs": "own", "losses": {"kl": 1.0}, "tokens": 256, "context": 32, "lr": 1e-3}
HEAL = {
    "name": "heal",
    "train": "all",
    "inputs": "own",
    "losses": {"kl": 1.0, "cross_entropy": 0.1},
    "tokens": 256,
    "context": 32,
    "lr": 1e-3,
}


def rows_of(folder):
    return [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return {name: tensor for file in sorted((folder / "student").glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def recipe_file(teacher_folder, text_file, tmp_path_factory):
    """Selection, then three stages of every kind: local transfer, adapters, all weights beside a live teacher."""
    recipe = tiny_recipe(teacher_folder, text_file, stages=[TRANSFER, LORA, HEAL], plan={"mixer": "window_linear", "window": 8, "sinks": 2})
    return write_recipe(tmp_path_factory.mktemp("recipe") / "three.yaml", recipe)


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory):
    """The folder of an unbroken run."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    run(str(recipe_file), out)
    return out


def test_what_a_run_leaves(finished):
    assert {entry.name for entry in finished.iterdir() if not entry.name.startswith(".")} == {
        "recipe.yaml", "plan.json", "selection.json", "log.jsonl", "results.json", "checkpoints", "student"
    }  # fmt: skip
    assert list(dict.fromkeys(row["stage"] for row in rows_of(finished))) == ["select", "transfer", "lora", "heal"]
    rows = json.loads((finished / "results.json").read_text())
    assert all(set(row) == helpers.keys_of(row) for row in rows)


def test_budget_is_kept(finished):
    plan = subquad.Plan.from_dict(json.loads((finished / "plan.json").read_text()))
    share = plan.student_bytes(1024) / plan.teacher_bytes(1024)
    assert 0.2 < share <= 0.4 and any(layer.exact or layer.mixer is None for layer in plan.layers)


def test_student_opens_and_says_where_it_is_from(finished, teacher_folder):
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    story = student.subquad_provenance
    assert story["teacher"] == str(teacher_folder) and story["trained_tokens"] == 768
    assert story["recipe"]["stages"][1]["name"] == "lora" and story["data_sha256"]["train"] != story["data_sha256"]["eval"]
    assert student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_second_call_changes_nothing(recipe_file, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "student").iterdir()}
    assert run(str(recipe_file), finished) == json.loads((finished / "results.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "student").iterdir()}


@pytest.mark.parametrize("stage", ["select", "transfer", "lora", "heal"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_in_a_stage_and_called_again(recipe_file, finished, tmp_path, stage, how):
    """The broken run ends with the same log and the same weights, bit for bit."""
    out = tmp_path / "broken"
    command = [sys.executable, "-c", KILLED, str(recipe_file), str(out), stage, str(int(how))]
    first = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if how == signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL, first.stderr
    else:
        assert first.returncode == 130 and "subquad run" in first.stderr, first.stderr
    assert not (out / "student").exists()
    run(str(recipe_file), out)
    assert rows_of(out) == rows_of(finished)
    ours, theirs = weights_of(out), weights_of(finished)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# A run that sends itself a signal after the third step of one stage. Every step saves, so that a kill finds a checkpoint to go on from.
KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
import subquad.healing as healing
from subquad.cli import main
recipe, out, stage, number = sys.argv[1:]
original = healing.run_stage
def run_stage(it, *, log, **more):
    def write(row):
        log(row)
        if row["stage"] == stage and row["step"] == 3:
            os.kill(os.getpid(), int(number))
    return original(it, log=write, save_every_seconds=0.0, **more)
healing.run_stage = run_stage
sys.argv = ["subquad", "run", recipe, "--out", out]
main()
"""


def test_a_second_process_is_kept_out(recipe_file, tmp_path):
    text = load_recipe(str(recipe_file)).dump()
    with RunFolder(tmp_path, text), pytest.raises(UserError, match="in use by another run"), RunFolder(tmp_path, text):
        pass


def test_a_run_from_before_a_setting_existed_goes_on(recipe_file, tmp_path):
    recipe = load_recipe(str(recipe_file))
    older = recipe.to_dict()
    del older["data"]["allow_overlap"], older["seed"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older))
    RunFolder(tmp_path, recipe.dump(), rewritten=rewritten).check()
    different = recipe.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"different recipe \(differs in: seed\)"):
        RunFolder(tmp_path, different.dump(), rewritten=rewritten).check()


def test_a_different_recipe_is_refused(recipe_file, finished):
    before = (finished / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"different recipe \(differs in: seed\)"):
        run(load_recipe(str(recipe_file), ["seed=1"]), finished)
    assert (finished / "recipe.yaml").read_text() == before


def test_a_strange_folder_is_refused(recipe_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no run"):
        run(str(recipe_file), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(str(recipe_file), tmp_path / "thesis.tex")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


# entry, what stands in it -> words of `run` and of `report`; None: it is made anew, not asked for, or a torn last line
DAMAGED = [
    ("plan.json", "{", "plan.json is damaged", "plan.json is damaged"),
    ("plan.json", "[]", "plan.json is damaged", "plan.json is damaged"),
    ("selection.json", "3", "selection.json is damaged", "selection.json is damaged"),
    ("selection.json", "{}", "selection.json is damaged", "selection.json is damaged"),
    ("results.json", "", "results.json is damaged", "results.json is damaged"),
    ("results.json", "{}", "results.json is damaged", "results.json is damaged"),
    ("results.json", "[3]", "results.json is damaged", "results.json is damaged"),
    ("results.json", '[{"model": "student"}]', "results.json is damaged", "results.json is damaged"),
    ("results.json", "[]", None, None),
    ("recipe.yaml", "{", "recipe.yaml is damaged", "recipe.yaml, line 1"),
    ("recipe.yaml", "3", "recipe.yaml is damaged", "recipe.yaml: expected a mapping"),
    ("recipe.yaml", "", "recipe.yaml is damaged", "recipe.yaml: expected a mapping"),
    ("log.jsonl", "3\n", None, "log.jsonl, line 1"),
    ("log.jsonl", "{\n", None, "log.jsonl, line 1"),
    ("log.jsonl", "{", None, None),
]


@pytest.mark.parametrize(("entry", "text", "running", "reporting"), DAMAGED)
def test_a_damaged_entry_is_named(recipe_file, finished, tmp_path, entry, text, running, reporting):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / entry).write_text(text)
    with pytest.raises(UserError, match=reporting) if reporting else nullcontext():
        collect(out)
    if entry == "selection.json":
        (out / "plan.json").unlink()  # or it is not asked for
    with pytest.raises(UserError, match=running) if running else nullcontext():
        run(str(recipe_file), out)
    assert running or json.loads((out / "results.json").read_text()) == json.loads((finished / "results.json").read_text())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_uniform_and_list(teacher_folder, text_file, tmp_path):
    for select, exact in [({"method": "uniform"}, None), ({"method": "list", "heads": {1: [0]}}, [(), (0,), ()])]:
        recipe = tiny_recipe(teacher_folder, text_file, select=select, stages=[], evals={}, sample=None)
        out = tmp_path / select["method"]
        assert run(load_recipe(write_recipe(tmp_path / f"{select['method']}.yaml", recipe)), out) == []
        plan = subquad.Plan.from_dict(json.loads((out / "plan.json").read_text()))
        assert plan.student_bytes(1024) <= 0.4 * plan.teacher_bytes(1024)
        assert exact is None or [layer.exact for layer in plan.layers] == exact


# ---- the same from Python --------------------------------------------------------------------------------------------------------------


def test_python_mirror(tiny_llama, tiny_tokenizer, text_file, tmp_path):
    """What the README shows."""
    plan = subquad.plan(tiny_llama, mixer="window", window=8, sinks=2, exact={1: [0]})
    assert subquad.plan(tiny_llama.config, mixer="window", window=8, sinks=2, exact={1: [0]}).layers == plan.layers
    student = subquad.linearize(tiny_llama, plan)
    assert student is tiny_llama
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    subquad.distill(student, [{**HEAL, "tokens": 64}], str(text_file), tokenizer=tiny_tokenizer, folder=tmp_path / "distill")
    assert any(not torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    rows = subquad.evaluate(student, str(text_file), {"perplexity": {"context": 32, "windows": 1}}, tokenizer=tiny_tokenizer)
    assert [row["model"] for row in rows] == ["student"]
    with pytest.raises(UserError, match="is a file"):
        subquad.distill(student, [HEAL], str(text_file), tokenizer=tiny_tokenizer, folder=text_file)
    assert subquad.restore(student) is tiny_llama


def test_packages_are_verbs_and_packages():
    import subquad.linearize.seam

    assert callable(subquad.linearize) and callable(subquad.distill) and subquad.linearize.seam.IMPLEMENTATION


def test_shrunken_model_is_the_first_layers(tiny_llama):
    small = shrink_model(tiny_llama)
    assert type(small) is type(tiny_llama) and small.config.num_hidden_layers == 2 and tiny_llama.config.num_hidden_layers == 3
    ours, theirs = small.state_dict(), tiny_llama.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    config = tiny_llama.config
    config.layer_types = ["full_attention"] * 3
    assert shrink_config(config).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("sets", "converted"),
    [
        (["plan.layers=[2]", "select=null", "budget=null"], [0, 1]),
        (["plan.layers=[1, 2]", "select=null", "budget=null"], [1]),
        (["plan.exact=[0, 1]", "select=null", "budget=null"], [0, 1]),
        (["plan.layers=[0, 2]", "plan.exact=[0, {1: [0]}]", "select=null", "budget=null"], [0]),
        (["select={method: list, heads: [1]}", "budget={kv_bytes: 0.4, at: 1024}"], [0]),
        ([f"evals.{name}={{lengths: [512, 4096], samples: 1}}" for name in RECALL], None),
    ],
    ids=["layers all gone", "layers partly gone", "all exact", "all that is left exact", "budget of all layers", "recall lengths"],
)
def test_smoke_takes_what_a_run_takes(recipe_file, teacher_folder, text_file, sets, converted):
    """Layers and lengths that are good in the whole model are good in its first two layers."""
    recipe = load_recipe(recipe_file, sets)
    for smoke in (False, True):
        recipe, teacher = shrink_recipe(recipe) if smoke else recipe, Teacher(recipe, smoke)
        plan = choose_heads(recipe, teacher.config, scores=None)
        text = Tokens.from_documents(read_documents(recipe.data, smoke)[1], teacher.tokenizer)
        check_tasks(recipe.evals.root, text, teacher.tokenizer)
    assert converted is None or [layer.index for layer in plan.converted] == converted


@pytest.mark.real_model
def test_quickstart_smoke(tmp_path):
    """The shipped recipe, whole, on two layers of the real model."""
    rows = run("quickstart", tmp_path / "smoke", smoke=True)
    assert {row["model"] for row in rows} == {"teacher", "window", "student"}
