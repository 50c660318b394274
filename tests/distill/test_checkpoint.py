import json
import resource
from contextlib import contextmanager

import pytest
import torch

from subquad.distill import checkpoint
from subquad.errors import UserError


def tensors(value=1.0, size=4):
    return {"model": {"a.weight": torch.full((size, 2), value).T, "b": torch.tensor(value)}}


def test_round_trip_and_layout(tmp_path):
    folder = checkpoint.step_folder(tmp_path, 120)
    checkpoint.save(folder, tensors(), {"step": 120, "loss": 0.1 + 0.2})
    assert folder.name == "step-00000120" and sorted(file.name for file in folder.iterdir()) == ["model.safetensors", "state.json"]
    state, model = checkpoint.load(folder, "model")
    assert state == {"step": 120, "loss": 0.1 + 0.2}
    assert all(value.equal(tensors()["model"][name]) for name, value in model.items())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000120"]


def test_the_newest_two_are_kept_and_a_partial_one_is_never_taken(tmp_path):
    for step in (5, 90, 100_000_000):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), tensors(step), {})
        checkpoint.prune(tmp_path)
    (tmp_path / "step-00000091.partial").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"
    checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000090", "step-100000000", "step-notes"]
    checkpoint.clear(tmp_path)
    assert checkpoint.latest(tmp_path) is None and (tmp_path / "step-notes").exists()


def test_saving_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path / "done", tensors(value), {})
    assert checkpoint.load(tmp_path / "done", "model")[1]["b"] == 2.0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_round_trip(optimizer):
    def steps(memory=None, count=3):
        torch.manual_seed(0)
        parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("x.a", "unused", "x.b")}
        made = optimizer(parameters.values(), lr=0.1)
        if memory is not None:
            checkpoint.load_optimizer(made, list(parameters), memory)
        for _ in range(count):
            (parameters["x.a"].square().sum() + parameters["x.b"].pow(4).sum()).backward()
            made.step()
        return checkpoint.optimizer_tensors(made, list(parameters))

    once = steps()
    assert not any("unused" in name for name in once)
    if optimizer is torch.optim.AdamW:
        assert set(once) == {f"{kind}/x.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in "ab"}
        assert steps(once, count=0).keys() == once.keys()
        assert all(value.equal(once[name]) for name, value in steps(once, count=0).items())


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage):
    checkpoint.save(tmp_path / "done", tensors(), {"step": 1})
    path = tmp_path / "done" / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:7] if damage == "cut" else b"\x00" * 64)
    with pytest.raises(UserError, match=file):
        checkpoint.load(tmp_path / "done", "model")


@contextmanager
def small_disk(size):
    """A file that grows beyond `size` bytes fails with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("numbers", "note"), [(100_000, ""), (10, "x" * 100_000)], ids=["tensors", "state"])
def test_a_full_disk_leaves_nothing_and_names_the_folder(tmp_path, numbers, note):
    checkpoint.save(tmp_path / "step-00000001", tensors(), {"step": 1})
    target = tmp_path / "step-00000002"
    with small_disk(50_000), pytest.raises(UserError, match=f"Cannot save the checkpoint {target}.*space"):
        checkpoint.save(target, tensors(size=numbers), {"note": note})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path))[0] == {"step": 1}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot save"):
        checkpoint.save(tmp_path / "file" / "step-00000001", tensors(), {})


def test_state_is_plain_json(tmp_path):
    checkpoint.save(tmp_path / "done", tensors(), {"losses": {"kl": 0.1}})
    assert json.loads((tmp_path / "done" / "state.json").read_text()) == {"losses": {"kl": 0.1}}
