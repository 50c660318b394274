"""`subquad doctor` says what is wrong with an environment, and its kernel rows tell right from wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from subquad import doctor
from subquad.cli import app

PLAIN = {"packages": {"triton": None, "fla-core": None}, "gpus": [], "compiler": "g++"}


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({}, []),
        ({"compiler": None}, ["C++ compiler"]),
        ({"packages": {"triton": "3.9.0", "fla-core": None}}, ["need a GPU"]),
        ({"packages": {"triton": None, "fla-core": "0.6.0"}}, ["Qwen3-Next"]),
        ({"packages": {"triton": None, "fla-core": "0.6.0"}, "gpus": ["A100"]}, ["Install triton"]),
    ),
)
def test_findings(changes, words):
    found = doctor.findings(PLAIN | changes)
    assert len(found) == len(words) and all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_a_wrong_kernel_is_seen():
    op, what, fn, arguments = next(doctor.cases("cpu", torch.float32))
    right = doctor.check(op, what, fn, arguments, "torch")
    wrong = doctor.check(
        op, what, lambda **given: fn(**given | {"scale": 0.2}) if given["backend"] == "torch" else fn(**given), arguments, "torch"
    )
    broken = doctor.check(op, what, lambda **given: 1 / 0, arguments, "torch")
    assert right["ok"] and right["output"] < 1e-5 and not wrong["ok"] and not broken["ok"] and "ZeroDivision" in doctor.line(broken)


def test_command():
    """Plain words and one JSON value; no kernel is touched without --kernels."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "Python" in result.output and "GPUs:" in result.output
    value = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert value["kernels"] == [] and value["packages"]["torch"]
