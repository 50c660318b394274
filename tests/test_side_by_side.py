"""benchmarks/side_by_side.py: presets that share a teacher's pass end with the weights they get alone."""

import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from subquad.distill.data import Batches, Tokens
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.healing import heal
from subquad.linearize import linearize, plan, restore
from subquad.linearize.seam import seams
from subquad.progress import Reporter

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

STAGE = Stage(name="t", train="mixers", inputs="teacher", losses={"attention_output": 1.0}, tokens=128, context=32, lr=1e-2)
SIZES = {"window": 8, "sinks": 2}
NAMES = ["window_linear", "gla", "nha", "retnet"]  # the joint one is calibrated, nha asks for keys before rotation


@pytest.fixture(scope="module")
def text() -> Tokens:
    return Tokens(np.random.default_rng(0).integers(0, 256, 400).astype(np.int32))


def alone(name: str, text: Tokens, folder: Path) -> list[dict]:
    model = helpers.tiny_model()
    what = plan(model, mixer=name, **SIZES)
    torch.manual_seed(0)
    student = linearize(model, what)
    heal(student, [STAGE], text, open_teacher=lambda: None, folder=folder / name, log=JsonLog(folder / "log"), seed=0, report=Reporter())
    return [seam.module.mixer.state_dict() for seam in seams(student)]


def test_sharing_the_teachers_pass_changes_no_weight(text, tmp_path):
    from side_by_side import make_runner, put_in, train

    model = helpers.tiny_model()
    runners = [make_runner(model, name, 0, **SIZES) for name in ["window", *NAMES]]
    train(model, runners, STAGE, Batches(text, context=32, batch=1, seed=0))
    assert not seams(model)
    for runner in runners[1:]:
        assert runner.steps == 4 and runner.seconds > 0 and not runner.failed
        expected = alone(runner.name, text, tmp_path)
        student = put_in(model, runner)
        for layer, (seam, wanted) in enumerate(zip(seams(student), expected, strict=True)):
            for key, value in seam.module.mixer.state_dict().items():
                assert torch.allclose(value, wanted[key], rtol=1e-6, atol=1e-7), f"{runner.name}, layer {layer}: {key}"
        restore(model)


def test_a_diverging_preset_is_taken_out_and_the_others_go_on(text):
    from side_by_side import make_runner, train

    model = helpers.tiny_model()
    broken, sound = (make_runner(model, name, 0, **SIZES) for name in ("linear", "retnet"))
    with torch.no_grad():
        next(broken.mixers[1].parameters()).fill_(float("nan"))
    train(model, [broken, sound], STAGE, Batches(text, context=32, batch=1, seed=0))
    assert broken.failed == "diverged at step 1 of 4" and sound.steps == 4 and sound.loss < 1
