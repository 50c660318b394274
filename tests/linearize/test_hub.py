"""A student folder: written whole or not at all, opened both ways, refused when damaged."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SIZES, TOKENS, tiny_model, tiny_tokenizer
from linearize.students import PRESETS, full, student_of, tokens
from safetensors.torch import load_file, save_file
from tolerances import FOLDER, SAME_NUMBERS, assert_near
from transformers import AutoConfig, AutoModelForCausalLM

import subquad
from subquad import UserError
from subquad.linearize import bundle, hub
from subquad.linearize.params import mixer_parameters

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = dict(window=6, sinks=2, exact={0: [1], 1: [0, 1]})  # one layer split, one untouched, one whole
PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (30, 17, 3)]
IDS = tokens(2, 24)


def student_folder(folder: Path, mixer: str = "gated_delta", **config):
    student = student_of(tiny_model(**config), mixer=mixer, **ARGUMENTS)
    hub.save(student, folder, tiny_tokenizer(), provenance={"teacher": "someone/tiny", "trained_tokens": 1234})
    return student


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(student in memory, folder it was saved in)."""
    folder = tmp_path_factory.mktemp("hub") / "student"
    return student_folder(folder), folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_the_cache_may_grow_after_training(tmp_path):
    """No parameter depends on the size of the sparse cache: what the config says when the folder is opened counts."""
    more = dict(mixer="gla", window=6, sinks=2)
    student = student_of(tiny_model(), options={"cache": 3}, **more)
    hub.save(student, tmp_path / "student", tiny_tokenizer(), provenance={})
    config = AutoConfig.from_pretrained(tmp_path / "student")
    config.plan["options"]["cache"] = 9
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "student", config=config)
    assert_near(full(larger, IDS), full(student_of(tiny_model(), options={"cache": 9}, **more), IDS), SAME_NUMBERS)
    assert not torch.allclose(full(larger, IDS), full(student, IDS), atol=1e-3)


# --- both ways in, in a new process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["package", "remote"])
def loaded(request, saved, tmp_path_factory):
    """(way, report, logits, folder saved again by the loaded model)."""
    out = tmp_path_factory.mktemp(request.param)
    (out / "prompts.json").write_text(json.dumps(PROMPTS))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "HF_MODULES_CACHE": str(out / "modules"), "OMP_NUM_THREADS": "1"}
    if request.param == "package":
        environment["PYTHONPATH"] = str(REPOSITORY)
    program = [sys.executable, str(Path(__file__).with_name("hub_worker.py"))]
    words = [request.param, str(saved[1]), str(out / "prompts.json"), str(out)]
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=600, env=environment, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads((out / "report.json").read_text()), load_file(out / "logits.safetensors"), out / "again"


def test_logits_are_those_in_memory(saved, loaded):
    _, _, logits, _ = loaded
    for i, prompt in enumerate(PROMPTS):
        assert_near(logits[f"logits{i}"], full(saved[0], torch.tensor([prompt])), FOLDER)


def test_texts_are_one_text(saved, loaded):
    """With and without a cache, alone and in a left-padded batch of three, here and there."""
    _, report, _, _ = loaded
    arguments = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=256)
    here = [saved[0].generate(torch.tensor([p]), **arguments)[0, len(p) :].tolist() for p in PROMPTS]
    assert report["alone"] == report["without cache"] == report["batch"] == here


def test_plain_transformers_refuses(loaded):
    way, report, _, _ = loaded
    assert report["tokens"] == tiny_tokenizer()("river").input_ids and report["class"] == "LlamaForCausalLM"
    if way == "remote":
        assert len(report["refusals"]) == 2 and all("trust_remote_code" in r for r in report["refusals"])
        assert report["modules"] == []


def test_what_was_loaded_can_be_saved_again(saved, loaded):
    """By plain save_pretrained, also of the student that runs from the folder's own code."""
    _, _, _, again = loaded
    assert {p.name for p in again.glob("*.py")} == {p.name for p in saved[1].glob("*.py")}
    for path in again.glob("*.py"):
        assert path.read_text() == (saved[1] / path.name).read_text(), path.name
    student = subquad.load(again)
    assert student.subquad_plan == saved[0].subquad_plan and student.subquad_provenance == saved[0].subquad_provenance
    assert_near(full(student, IDS), full(saved[0], IDS), SAME_NUMBERS)


def test_without_its_code_the_folder_is_unknown(copy):
    """model_type is ours: a config that does not point at the code beside it is nothing transformers knows."""
    config = json.loads((copy / "config.json").read_text())
    assert config["model_type"] == "subquad" and config["teacher"]["model_type"] == "llama"
    config["model_type"] = "subquad_of_another_name"
    config.pop("auto_map")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="subquad_of_another_name"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_code_in_the_folder_needs_torch_and_transformers_only():
    files = bundle.files()
    assert bundle.FILE in files
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
                assert node.level <= 1
                if node.level and node.module:
                    assert f"{node.module}.py" in files, f"{name} imports {node.module}, which is not written"
            else:
                continue
            assert {n.split(".")[0] for n in names} <= allowed, f"{name} imports {names}"


# --- what is kept ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_load_gives_the_same_numbers(tmp_path, mixer, family):
    teacher = tiny_model(family, **({"n_embd": 64, "n_layer": 3, "n_head": 4} if family == "gpt2" else {"tie_word_embeddings": True}))
    student = student_of(teacher, mixer=mixer, **ARGUMENTS)
    hub.save(student, tmp_path / "student")
    for again in (subquad.load(tmp_path / "student"), AutoModelForCausalLM.from_pretrained(tmp_path / "student")):
        assert torch.equal(full(again, IDS), full(student, IDS))
        assert not again.training and again.subquad_plan == student.subquad_plan
        assert torch.equal(full(copy_of(again), IDS), full(student, IDS))
        assert torch.equal(full(subquad.restore(again), IDS), full(teacher, IDS))


def copy_of(model):
    return pickle.loads(pickle.dumps(model))


def test_text_part_of_a_larger_config(tmp_path):
    """transformers lists the whole config; the causal model's own config is the part."""
    whole = AutoConfig.for_model("emu3", text_config={**SIZES, **TOKENS})
    student = student_of(AutoModelForCausalLM.from_config(whole).eval(), **ARGUMENTS)
    assert type(student.config) is type(whole.text_config)
    student.save_pretrained(tmp_path / "student")
    assert_near(full(subquad.load(tmp_path / "student"), IDS), full(student, IDS), SAME_NUMBERS)


def test_folder_holds_what_a_model_folder_holds(saved):
    student, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md", bundle.FILE}
    config = json.loads((folder / "config.json").read_text())
    assert config["plan"] == student.subquad_plan.to_dict() and config["provenance"]["trained_tokens"] == 1234
    assert config["vocab_size"] == 257 and config["num_hidden_layers"] == 3
    card = (folder / "README.md").read_text()
    assert "gated_delta" in card and "someone/tiny" in card and "1,234" in card and "{{" not in card
    assert hub.is_student(folder) and AutoConfig.from_pretrained(folder).teacher_config().model_type == "llama"


def test_bf16_student_keeps_mixers_in_fp32(tmp_path):
    student = student_of(tiny_model().bfloat16(), mixer="gla", **ARGUMENTS)
    hub.save(student, tmp_path / "student")
    again = subquad.load(tmp_path / "student")
    assert again.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in mixer_parameters(again).values())
    wanted = student.state_dict()
    assert all(torch.equal(x, wanted[name]) and x.dtype == wanted[name].dtype for name, x in again.state_dict().items())


def test_dtype_can_be_asked_for(saved):
    again = subquad.load(saved[1], dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in mixer_parameters(again).values())


def test_several_weight_files(saved, tmp_path):
    saved[0].save_pretrained(tmp_path / "student", max_shard_size="100KB")
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 1
    assert torch.equal(full(subquad.load(tmp_path / "student"), IDS), full(saved[0], IDS))


def test_saving_changes_nothing(saved):
    student, _ = saved
    assert student.config.model_type == "llama" and student.config.architectures != ["SubquadForCausalLM"]
    assert subquad.plan(student, mixer="gated_delta", **ARGUMENTS) == student.subquad_plan


# --- what is refused ---------------------------------------------------------------------------------------------------------------


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def edit_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


def edit_config(change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


MIXER_WEIGHT = "model.layers.2.self_attn.mixer.read_scale"
DAMAGE = {
    "weights cut off": (cut_weights, "model.safetensors is damaged"),
    "weights empty": (empty_weights, "model.safetensors is damaged"),
    "no weights": (no_weights, "Save or download the student again"),
    "a mixer's weight missing": (edit_weights(lambda w: w.pop(MIXER_WEIGHT)), "1 missing, 0 unexpected, 0 of another shape"),
    "a teacher's weight missing": (
        edit_weights(lambda w: w.pop("model.layers.0.mlp.up_proj.weight")),
        "1 missing, 0 unexpected, 0 of another shape",
    ),
    "a weight too many": (edit_weights(lambda w: w.update(more=torch.zeros(1))), "0 missing, 1 unexpected"),
    "a weight of another shape": (
        edit_weights(lambda w: w.update({MIXER_WEIGHT: torch.zeros(7)})),
        "1 of another shape, for example .*read_scale",
    ),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "config of a teacher": (edit_config(lambda c: c.update(model_type="llama")), "is not a student folder"),
    "no teacher in it": (edit_config(lambda c: c.pop("teacher")), "names no teacher"),
    "teacher of no known family": (edit_config(lambda c: c["teacher"].update(model_type="nonesuch")), "'nonesuch' model"),
    "teacher of numbers that do not fit": (edit_config(lambda c: c["teacher"].update(hidden_size=63)), "no config of a 'llama' model .*63"),
    "teacher of another type": (edit_config(lambda c: c["teacher"].update(hidden_size="a")), "no config of a 'llama' model .*hidden_size"),
    "teacher no mapping": (edit_config(lambda c: c.update(teacher="llama")), "names no teacher"),
    "plan of values that do not fit": (
        edit_config(lambda c: c["plan"]["layers"][2].update(window=-1, exact=[9])),
        "(?s)window: got -1.*exact: got",
    ),
    "teacher that is no language model": (
        edit_config(lambda c: c.update(teacher={"model_type": "vit"})),
        "no causal language model for 'vit'",
    ),
    "plan of another version": (edit_config(lambda c: c["plan"].update(speed=1)), "does not fit this version"),
    "mixer of another version": (edit_config(lambda c: c["plan"]["layers"][2].update(mixer="os:system")), "Unknown mixer"),
    "other plan": (edit_config(lambda c: c["plan"]["layers"][2].update(mixer="window")), "unexpected"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folder(copy, what):
    damage, words = DAMAGE[what]
    damage(copy)
    with pytest.raises(UserError, match=words):
        subquad.load(copy)


def test_heads_that_only_the_plan_has(tmp_path):
    """`window` has no weights that could be of another shape."""
    hub.save(student_of(tiny_model(), window=6, sinks=2), tmp_path / "student")
    edit_config(lambda c: c["plan"]["layers"][1].update(groups=4))(tmp_path / "student")
    with pytest.raises(UserError, match=r"Layer 1 .* are \(8, 2, 16, 16\) in the plan and \(4, 2, 16, 16\) in the model"):
        full(subquad.load(tmp_path / "student"), IDS)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="No such folder"):
        subquad.load(tmp_path / "nowhere")


def names(folder: Path) -> set:
    return {path.name for path in folder.iterdir()}


def test_folder_in_use_is_left_alone(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for overwrite, words in ((False, "is not empty.*overwrite=True"), (True, "never overwritten")):
        with pytest.raises(UserError, match=words):
            hub.save(saved[0], tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        hub.save(saved[0], tmp_path / "mine" / "thesis.tex")
    assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == {"thesis.tex"}


def test_a_student_is_replaced_when_told_to(saved, copy):
    (copy / "model-00001-of-00002.safetensors").write_text("of an older save")
    with pytest.raises(UserError, match="is not empty"):
        hub.save(saved[0], copy)
    hub.save(saved[0], copy, overwrite=True)
    assert not (copy / "model-00001-of-00002.safetensors").exists() and names(copy.parent) == {"copy"}
    assert torch.equal(full(subquad.load(copy), IDS), full(saved[0], IDS))


def test_an_empty_folder_is_used(saved, tmp_path):
    (tmp_path / "student").mkdir()
    hub.save(saved[0], tmp_path / "student")
    assert hub.is_student(tmp_path / "student")


@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_full_half_way_leaves_nothing_behind(saved, copy, monkeypatch, overwrite):
    """The folder that was there stays as it was."""
    target = copy if overwrite else copy.parent / "new"
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subquad.linearize.hub.write_card", full_disk)
    with pytest.raises(UserError, match=r"No space left.*nothing was left behind"):
        hub.save(saved[0], target, overwrite=overwrite)
    assert names(copy.parent) == {"copy"} and {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_bug_while_saving_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("subquad.linearize.hub.write_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.save(saved[0], tmp_path / "student")
    assert names(tmp_path) == set()


def test_an_unconverted_model_is_no_student(tmp_path):
    with pytest.raises(UserError, match="no converted layers"):
        hub.save(tiny_model(), tmp_path / "student")
    assert names(tmp_path) == set()


def test_restored_model_saves_as_the_teacher(tmp_path):
    model = student_of(tiny_model(), window=8)
    subquad.restore(model).save_pretrained(tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["model_type"] == "llama"
    assert not list((tmp_path / "teacher").glob("*.py")) and not hub.is_student(tmp_path / "teacher")
