"""A user's mistakes, one row each: one clear message on standard error, exit code 2, no traceback, nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_teacher, tiny_model, tiny_recipe, tiny_tokenizer, words, write_recipe
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import subquad
from subquad import UserError
from subquad.cli import app
from subquad.distill.data import Document, Tokens, load_documents


class Place:
    """A folder with a teacher, a text and a recipe, and `out` that a refused command must not create."""

    def __init__(self, folder: Path, teacher: Path, text: Path):
        self.folder, self.teacher, self.text, self.out = folder, teacher, text, folder / "out"

    def recipe(self, **changes) -> list:
        return ["run", write_recipe(self.folder / "mine.yaml", tiny_recipe(self.teacher, self.text, **changes)), "--out", self.out]

    def stage(self, **changes) -> dict:
        return tiny_recipe(self.teacher, self.text)["stages"][0] | changes

    def copy_of_teacher(self) -> Path:
        return Path(shutil.copytree(self.teacher, self.folder / "copy"))


@pytest.fixture
def place(tmp_path, teacher_folder, text_file):
    return Place(tmp_path, teacher_folder, text_file)


def call(words) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout, result.stderr


def unsupported(place):
    """bloom computes attention in its own way, past the interface."""
    folder = place.folder / "bloom"
    tiny_model("bloom", n_layer=2, n_head=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def corrupt(place):
    """A weights file cut off in the middle."""
    folder = place.copy_of_teacher()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def corrupt_student(place):
    folder = place.folder / "student"
    assert call(["linearize", place.teacher, "--window", 8, "--out", folder])[0] == 0
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def spoiled(place, of: str, damage) -> Path:
    """A copy of the teacher, or a student of it, after `damage(folder)`."""
    folder = place.copy_of_teacher() if of == "teacher" else student(place)
    damage(folder)
    return folder


def text_named(place, name: str, data: bytes) -> Path:
    (place.folder / name).write_bytes(data)
    return place.folder / name


def edit_config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def lack_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


DAMAGE = {  # what -> (damage, words)
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "weights of random bytes": (lambda f: (f / "model.safetensors").write_bytes(bytes(range(256)) * 20), "damaged"),
    "weights without a header's end": (lambda f: (f / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b'{"a":'), "damaged"),
    "a weight missing": (lack_a_weight, "1 missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer. Save one beside the model"),
    "tokenizer no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "Could not open"),
}


def used(place):
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("years of work")
    return place.out


# what -> (command, words the message must hold)
MISTAKES = {
    "unknown recipe": (lambda p: ["run", "quikstart", "--out", p.out], ["Did you mean 'quickstart'"]),
    "missing recipe file": (lambda p: ["run", p.folder / "no.yaml", "--out", p.out], ["no.yaml"]),
    "unknown recipe key": (lambda p: p.recipe(tacher="x"), ["tacher", "Did you mean 'teacher'"]),
    "unknown key by --set": (lambda p: [*p.recipe(), "--set", "plan.windw=3"], ["plan.windw", "Did you mean 'window'"]),
    "unknown mixer": (lambda p: p.recipe(plan={"mixer": "windwo"}), ["'windwo'", "Did you mean 'window'"]),
    "unknown mixer in plan": (lambda p: ["plan", p.teacher, "--mixer", "glaa"], ["'glaa'", "Did you mean 'gla'"]),
    "unknown eval": (lambda p: p.recipe(evals={"perplexiti": {}}), ["'perplexiti'", "Did you mean 'perplexity'"]),
    "texts that do not fit": (lambda p: p.recipe(evals={"passkey": {"lengths": [128]}}), ["passkey.lengths", "128 are too few"]),
    "impossible budget": (lambda p: p.recipe(budget={"kv_bytes": 0.001, "at": 64}), ["budget", "at least 0."]),
    "budget no list keeps": (
        lambda p: p.recipe(select={"method": "list", "heads": [0, 1]}, budget={"kv_bytes": 0.1, "at": 1024}),
        ["budget"],
    ),
    "missing data file": (lambda p: p.recipe(data={"train": "no/such/novel.txt"}), ["no/such/novel.txt"]),
    "too little text": (lambda p: p.recipe(data={"train": str(tiny_text(p))}), ["tokens"]),
    "missing teacher": (lambda p: p.recipe(teacher=str(p.folder / "nowhere")), ["nowhere"]),
    "missing model": (lambda p: ["plan", p.folder / "nowhere"], ["nowhere"]),
    "missing gguf": (lambda p: ["plan", p.folder / "no.gguf"], ["no.gguf"]),
    "unsupported model": (lambda p: p.recipe(teacher=str(unsupported(p))), ["bloom", "attention interface"]),
    "unsupported model in plan": (lambda p: ["plan", unsupported(p)], ["bloom", "attention interface"]),
    "corrupt teacher": (lambda p: ["linearize", corrupt(p), "--out", p.out], ["damaged", "copy"]),
    "corrupt teacher in run": (lambda p: p.recipe(teacher=str(corrupt(p))), ["damaged", "copy"]),
    "corrupt student": (lambda p: ["chat", corrupt_student(p), "--prompt", "a"], ["safetensors"]),
    "student is no teacher": (lambda p: ["plan", student(p)], ["student"]),
    "no student": (lambda p: ["eval", p.teacher, "--data", p.text], ["no student folder"]),
    "no such head": (lambda p: ["plan", p.teacher, "--exact", "0:7"], ["0..1", "7"]),
    "weights of another shape": (
        lambda p: ["linearize", spoiled(p, "teacher", edit_config(hidden_size=32)), "--out", p.out],
        ["of another shape"],
    ),
    "junk in --set": (lambda p: [*p.recipe(), "--set", "junk"], ["key=value"]),
    "junk in --exact": (lambda p: ["plan", p.teacher, "--exact", "0:1:2"], ["layer:head"]),
    "negative layer": (lambda p: ["plan", p.teacher, "--exact", "-1"], ["-1"]),
    "negative window": (lambda p: p.recipe(plan={"mixer": "window", "window": -3}), ["window", "-3"]),
    "folder as recipe": (lambda p: ["run", p.folder, "--out", p.out], ["Unknown recipe"]),
    "recipe no YAML": (lambda p: ["run", text_named(p, "a.yaml", b"a: [b"), "--out", p.out], ["not valid YAML"]),
    "recipe no text": (lambda p: ["run", text_named(p, "a.yaml", b"\xff\xfe"), "--out", p.out], ["Cannot read"]),
    "recipe empty": (lambda p: ["run", text_named(p, "a.yaml", b""), "--out", p.out], ["expected a mapping"]),
    "data no UTF-8": (lambda p: p.recipe(data={"train": str(text_named(p, "a.txt", b"caf\xe9"))}), ["a.txt", "UTF-8"]),
    "data empty": (lambda p: p.recipe(data={"train": str(text_named(p, "a.txt", b""))}), ["holds no text"]),
    "data a broken line": (lambda p: p.recipe(data={"train": str(text_named(p, "a.jsonl", b'{"text": "a"}\n{"te'))}), ["line 2"]),
    "out is a file": (lambda p: ["run", *p.recipe()[1:3], p.text], ["is a file"]),
    "encoder": (lambda p: ["plan", text_named(p, "config.json", b'{"model_type": "bert"}').parent], ["bidirectional", "Mixers that are"]),
    "encoder and decoder": (lambda p: ["plan", text_named(p, "config.json", b'{"model_type": "t5"}').parent], ["no causal language model"]),
    "option that nothing reads": (
        lambda p: ["plan", p.teacher, "--mixer", "gla", "--set", "options.slots=99"],
        ["options.slots", "container=plain", "It counts with container=gated_slots or softmax_slots or slots."],
    ),
    "no such layer": (lambda p: ["plan", p.teacher, "--exact", "9"], ["9", "0..2"]),
    "nothing in --exact": (lambda p: ["plan", p.teacher, "--exact", ""], ["layers such as"]),
    "no name of a model": (lambda p: ["plan", ""], ["No such model: ''"]),
    "stage longer than the text": (lambda p: p.recipe(stages=[p.stage(context=10**5, tokens=10**5)]), ["less than one context of 100,000"]),
    "stage of bfloat16": (lambda p: p.recipe(dtype="bfloat16"), ["kept as bfloat16", "float32"]),
    "stage of bfloat16, no selection": (lambda p: p.recipe(dtype="bfloat16", select=None, budget=None), ["kept as bfloat16"]),
    "stage of nothing": (lambda p: p.recipe(stages=[p.stage(train="mixers")]), ["nothing to train"]),
    "corrupt teacher, no selection": (lambda p: p.recipe(teacher=str(corrupt(p)), select=None, budget=None), ["damaged", "copy"]),
    "empty prompt in run": (lambda p: p.recipe(sample={"prompt": ""}), ["has no tokens"]),
    "empty prompt": (lambda p: ["chat", p.teacher, "--prompt", ""], ["has no tokens"]),
    "file as a student": (lambda p: ["distill", p.text, "--out", p.out], ["no student folder"]),
    "out in a file": (lambda p: ["linearize", p.teacher, "--out", p.text / "x"], ["is a file"]),
    "out of eval is a file": (lambda p: ["eval", student(p), "--data", p.text, "--out", p.text], ["is a file"]),
    "out of diagnose is a file": (lambda p: ["eval", "diagnose", student(p), "--data", p.text, "--out", p.text], ["is a file"]),
    "out of copy in a file": (lambda p: ["recipes", "copy", "quickstart", p.text / "x.yaml"], ["is a file"]),
    "out of report is a folder": (lambda p: ["report", p.folder, "--out", p.teacher], ["is a folder", "report.html"]),
    "teacher that is not measured": (lambda p: ["eval", p.folder, "--models", "student", "--teacher", "x"], ["--teacher", "--models"]),
    "model without a mixer": (lambda p: ["mixers", "--model", p.teacher], ["which mixer"]),
    "window without a model": (lambda p: ["mixers", "gla", "--window", 3], ["--model"]),
}  # fmt: skip


def text_stage() -> list:
    return [{"name": "a", "train": "mixers", "inputs": "own", "losses": {"kl": 1.0}, "tokens": 64, "context": 32, "lr": 1e-3}]


# From Python: what -> (call of an unconverted model and a folder, words the UserError must hold)
CALLS = {
    "restore": (lambda m, f: subquad.restore(m), "LlamaForCausalLM is not converted: call subquad.linearize"),
    "distill": (lambda m, f: subquad.distill(m, text_stage(), words(900), folder=f, tokenizer=tiny_tokenizer()), "is not converted"),
    "evaluate": (lambda m, f: subquad.evaluate(m, tokens_of(900), {"perplexity": {"context": 32}}, teacher=m), "is not converted"),
    "plan a name": (lambda m, f: subquad.plan("teacher"), "takes a transformers model or its config, got 'teacher' .str.. Open one"),
    "linearize a name": (lambda m, f: subquad.linearize("teacher", subquad.plan(m)), "takes a transformers model, got 'teacher'"),
    "no plan": (lambda m, f: subquad.linearize(m, None), "linearize takes a plan, got None"),
    "other heads": (
        lambda m, f: subquad.linearize(m, subquad.plan(tiny_model(num_key_value_heads=4))),
        "Layers 0..2 of 'llama': the plan says kv_heads 4, groups 1, the model has kv_heads 2, groups 2. Make the plan from this model",
    ),
    "other sizes": (
        lambda m, f: subquad.linearize(m, subquad.plan(tiny_model(head_dim=32))),
        "key 32, value 32, the model has key 16, value 16",
    ),
    "other window": (
        lambda m, f: subquad.linearize(tiny_model("mistral", sliding_window=8), subquad.plan(tiny_model("mistral", sliding_window=None))),
        "the plan says teacher_window None, the model has teacher_window 8",
    ),
    "a number as data": (lambda m, f: load_documents(5), "a name, a path or a list of them, got 5"),
    "a text as data": (lambda m, f: load_documents(words(900)), "A data source is 'pydoc', a text file"),
}


@pytest.mark.parametrize("what", CALLS)
def test_mistake_from_python(tmp_path, what):
    call, expected = CALLS[what]
    model = tiny_model()
    with pytest.raises(UserError, match=expected):
        call(model, tmp_path / "out")
    assert not hasattr(model, "subquad_plan") and not (tmp_path / "out").exists()


def tokens_of(count: int) -> Tokens:
    return Tokens.from_documents([Document("words", words(count))], tiny_tokenizer())


def tiny_text(place):
    path = place.folder / "short.txt"
    path.write_text("too short")
    return path


def student(place):
    assert call(["linearize", place.teacher, "--window", 8, "--out", place.folder / "student"])[0] == 0
    return place.folder / "student"


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake(place, what):
    command, expected = MISTAKES[what]
    code, stdout, stderr = call(command(place))
    assert code == 2, stdout + stderr
    assert all(word in stderr for word in expected), stderr
    assert "Traceback" not in stderr and len(stderr.strip().splitlines()) <= 3, stderr
    assert not place.out.exists(), f"left behind: {[entry.name for entry in place.out.iterdir()]}"


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_model(place, what, of):
    damage, words = DAMAGE[what]
    folder = spoiled(place, of, damage)
    code, stdout, stderr = call(["linearize", folder, "--out", place.out] if of == "teacher" else ["chat", folder, "--prompt", "a"])
    assert code == 2 and words in stderr, stdout + stderr
    assert "Traceback" not in stderr and not place.out.exists()


def distilled(place, *words, student="out/student", data=None) -> list:
    small = ["--set", "tokens=64", "--set", "context=32"]
    return ["distill", place.folder / student, "--data", data or place.text, *words, *small, "--out", place.out]


# calls that are refused although --overwrite allows them to delete what is in `out`, a run of before -> words
KEPT = {
    "evals longer than the text": (lambda p: p.recipe(evals={"perplexity": {"context": 10**5}}), ["perplexity"]),
    "stage longer than the text": (lambda p: p.recipe(stages=[p.stage(context=10**5, tokens=10**5)]), ["of 100,000"]),
    "gates longer than the text": (lambda p: p.recipe(select={"method": "gates", "context": 10**5, "tokens": 10**5}), ["of 100,000"]),
    "corrupt teacher": (lambda p: p.recipe(teacher=str(corrupt(p))), ["damaged"]),
    "distill of itself": (distilled, ["student", "lies in"]),
    "distill into its student": (lambda p: [*distilled(p)[:-1], p.out / "student"], ["lies in"]),
    "distill by a teacher in it": (lambda p: distilled(p, "--teacher", p.out / "student", student="before"), ["lies in"]),
    "distill by no teacher": (lambda p: distilled(p, "--teacher", p.folder / "nowhere", student="before"), ["nowhere"]),
    "distill too little text": (lambda p: distilled(p, student="before", data=tiny_text(p)), ["9 tokens"]),
    "linearize a teacher in it": (lambda p: ["linearize", p.out / "student/teacher", "--out", p.out / "student"], ["lies in"]),
}


@pytest.mark.parametrize("what", KEPT)
def test_refused_overwrite_deletes_nothing(place, what):
    shutil.move(student(place), place.folder / "before")
    shutil.copytree(place.folder / "before", place.out / "student")
    shutil.copytree(place.teacher, place.out / "student/teacher")
    (place.out / "recipe.yaml").write_text("seed: 7")
    before = sorted(place.out.rglob("*"))
    command, expected = KEPT[what]
    code, stdout, stderr = call([*command(place), "--overwrite"])
    assert code == 2 and all(word in stderr for word in expected), stdout + stderr
    assert sorted(place.out.rglob("*")) == before


@pytest.mark.parametrize("verb", ["run", "linearize"])
def test_output_folder_in_use(place, verb):
    words = place.recipe() if verb == "run" else ["linearize", place.teacher, "--window", 8, "--out", place.out]
    code, _, stderr = call([*words[:-1], used(place)])
    assert code == 2 and "--overwrite" in stderr
    assert [entry.name for entry in place.out.iterdir()] == ["thesis.tex"]


def test_all_problems_at_once(place):
    code, _, stderr = call(p := place.recipe(tacher="x", plan={"mixer": "windwo", "window": 0}))
    assert code == 2 and p and len(stderr.strip().splitlines()) == 3


@pytest.mark.parametrize("verb", ["run", "linearize"])
def test_full_disk(place, verb):
    """A file-size limit makes the system refuse large files, as a full disk does. Nothing half-written may stay."""
    words = place.recipe() if verb == "run" else ["linearize", place.teacher, "--window", 8, "--out", place.out]
    script = f"import sys; sys.argv = ['subquad', *{[str(word) for word in words]!r}]; from subquad.cli import main; main()"
    limit = 150_000  # bytes; the student has 400,000
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and ("space" in result.stderr or "large" in result.stderr), result.stderr
    assert not (place.out / "student").exists()
    assert not [path for path in place.out.rglob("*") if "tmp" in path.name or "partial" in path.name]


def test_interrupted_recipe_is_json(place):
    """--json keeps standard output clean, also when the command fails."""
    code, stdout, stderr = call([*place.recipe(tacher="x"), "--json"])
    assert code == 2 and stdout == "" and "tacher" in stderr


def test_json_of_a_good_plan(place):
    code, stdout, _ = call(["plan", place.teacher, "--json"])
    assert code == 0 and json.loads(stdout)["mixer"] == "window"


def test_teacher_helper_is_what_the_table_assumes(tmp_path):
    assert (save_teacher(tmp_path / "t") / "model.safetensors").stat().st_size > 200_000
