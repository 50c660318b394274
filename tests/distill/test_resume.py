"""Kill it anywhere, run the same again: the same weights and the same log, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subquad.distill.checkpoint import latest
from subquad.distill.log import JsonLog, timeless

WORKER = Path(__file__).with_name("worker.py")
FINISHED = ["lora", "lora/done", "transfer", "transfer/done"]
EVERY_STEP, NEVER = 0.0, 1e9
TIMEOUT = 300  # seconds; a run takes five on a quiet machine


def start(folder, every, launcher=(), pause=0.0):
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join(str(Path(__file__).parents[level]) for level in (1, 2))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(WORKER), str(folder), str(every), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(folder, every=NEVER, launcher=()):
    process = start(folder, every, launcher)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def send_when(folder, every, number, stage, step):
    """Start, wait for the log row of (stage, step), send the signal; what the process printed and its exit code."""
    process, log = start(folder, every, pause=0.05), JsonLog(folder / "log.jsonl")
    deadline = time.monotonic() + TIMEOUT
    while not any(row["stage"] == stage and row["step"] >= step for row in log.rows()):
        assert process.poll() is None and time.monotonic() < deadline, "the stage ended before the signal"
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=TIMEOUT)[0], process.returncode


def rows(folder):
    return [timeless(row) for row in JsonLog(folder / "log.jsonl").rows()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(folder)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()) == FINISHED
    return folder


def test_killed_and_stopped_again_and_again(unbroken, tmp_path):
    for stage, step in (("transfer", 20), ("lora", 9)):
        _, code = send_when(tmp_path, EVERY_STEP, signal.SIGKILL, stage, step)
        assert code == -signal.SIGKILL
    (tmp_path / "lora" / "step-00000055.partial").mkdir()  # as a kill in the middle of a save would leave it

    printed, code = send_when(tmp_path, NEVER, signal.SIGTERM, "lora", 30)
    assert code == 130 and "Stopped in stage lora" in printed and "run the same command again" in printed
    newest = latest(tmp_path / "lora")
    assert sorted(file.name for file in newest.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert rows(tmp_path)[-1]["step"] == int(newest.name.removeprefix("step-"))

    assert "transfer skipped" in finish(tmp_path)
    for again in (False, True):  # the second time every stage is read back
        assert rows(tmp_path) == rows(unbroken)
        assert (tmp_path / "final.safetensors").read_bytes() == (unbroken / "final.safetensors").read_bytes()
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()) == FINISHED
        assert again or "lora skipped" in finish(tmp_path)


def test_two_processes_agree_with_one(unbroken, tmp_path):
    """Data parallel by the launcher alone. Sums are ordered differently: equal but for rounding (and dropout, hence the first stage only).

    torch's launcher, because accelerate's starts several CPU processes through MPI only.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    assert finish(tmp_path, launcher=launcher).count("transfer ran") == 2
    one, two = ([row for row in rows(folder) if row["stage"] == "transfer"] for folder in (unbroken, tmp_path))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for what in ("loss", "grad_norm"):
        assert [row[what] for row in two] == pytest.approx([row[what] for row in one], rel=1e-5), what
