"""Kill it anywhere, run the same again: the same weights and the same log, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subquad.distill.log import JsonLog, timeless

WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]
EVERY_STEP, NEVER = 0.0, 1e9


def start(folder, every):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*WORKER, str(folder), str(every)], stdout=subprocess.PIPE, text=True, env=environment)


def finish(folder, every=NEVER):
    process = start(folder, every)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def send_when(folder, every, number, stage, step):
    """Start, wait for the log row of (stage, step), send the signal; what the process printed and its exit code."""
    process, log = start(folder, every), JsonLog(folder / "log.jsonl")
    deadline = time.monotonic() + 120
    while not any(row["stage"] == stage and row["step"] >= step for row in log.rows()):
        assert process.poll() is None and time.monotonic() < deadline, "the stage ended before the signal"
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=60)[0], process.returncode


def outcome(folder):
    return (folder / "final.safetensors").read_bytes(), [timeless(row) for row in JsonLog(folder / "log.jsonl").rows()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(folder)
    assert sorted(path.name for path in folder.rglob("*") if path.is_dir()) == ["done", "done", "lora", "transfer"]
    return outcome(folder)


def test_killed_in_both_stages(unbroken, tmp_path):
    for stage, step in (("transfer", 20), ("lora", 9)):
        _, code = send_when(tmp_path, EVERY_STEP, signal.SIGKILL, stage, step)
        assert code == -signal.SIGKILL and not (tmp_path / "final.safetensors").exists()
    (tmp_path / "lora" / "step-00000055.partial").mkdir()  # as a kill in the middle of a save would leave it
    assert "transfer skipped" in finish(tmp_path)
    assert outcome(tmp_path) == unbroken
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("step-*"))


def test_stopped_by_sigterm_and_continued(unbroken, tmp_path):
    printed, code = send_when(tmp_path, NEVER, signal.SIGTERM, "lora", 5)
    assert code == 130 and "Stopped in stage lora" in printed and "run the same command again" in printed
    (saved,) = (tmp_path / "lora").iterdir()
    assert sorted(file.name for file in saved.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert JsonLog(tmp_path / "log.jsonl").rows()[-1]["step"] == int(saved.name.removeprefix("step-"))
    finish(tmp_path)
    assert outcome(tmp_path) == unbroken


def test_a_finished_run_is_read_back(unbroken, tmp_path):
    first = finish(tmp_path)
    again = finish(tmp_path)
    assert again == first.replace("ran", "skipped") and outcome(tmp_path) == unbroken
