import signal
import threading

import pytest
import torch

from distill.student import as_teacher, mixers, stage, student, text, transfer
from subquad.distill import checkpoint
from subquad.distill.data import Batches
from subquad.distill.log import timeless
from subquad.distill.loop import run_stage
from subquad.distill.objectives import logits_objective, same_weights, transfer_objective
from subquad.distill.signals import Interrupted, StopSignals
from subquad.errors import UserError


def run(folder, model=None, parameters=None, objective=None, seed=0, tokens=None, **settings):
    """run_stage on the tiny student; returns (model, result, rows)."""
    rows = settings.pop("rows", [])
    names = {"log", "rewind", "resume", "save_every_seconds"} & settings.keys()
    loop = {"log": rows.append} | {name: settings.pop(name) for name in names}
    model, now = model or student(), stage(**settings)
    if objective is None and now.inputs == "teacher":
        objective = transfer_objective(model, transfer, now.losses)
    elif objective is None:
        objective = logits_objective(model, same_weights(model, as_teacher), now.losses)
    batches = Batches(tokens or text(), now.context, now.batch, now.repeat, seed)
    parameters = mixers(model) if parameters is None else parameters
    result = run_stage(now, model=model, parameters=parameters, objective=objective, batches=batches, folder=folder, **loop)
    return model, result, rows


@pytest.mark.parametrize("settings", [{}, {"inputs": "teacher", "losses": {"attention_output": 1}}], ids=["kl", "transfer"])
def test_it_learns_and_moves_nothing_else(tmp_path, settings):
    before = student().state_dict()
    model, result, rows = run(tmp_path, lr=0.2, **settings)
    assert result.steps == 10 and result.tokens == 320 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == set(mixers(model))


@pytest.mark.parametrize("settings", [{}, {"inputs": "teacher", "losses": {"attention_output": 1}}], ids=["kl", "transfer"])
def test_bf16_products_leave_weights_in_fp32_and_nearly_the_same_losses(tmp_path, settings):
    outcomes = {}
    for precision in ("no", "bf16"):
        model, _, rows = run(tmp_path / precision, mixed_precision=precision, **settings)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        outcomes[precision] = [row["loss"] for row in rows]
    assert outcomes["bf16"] != outcomes["no"]
    assert outcomes["bf16"] == pytest.approx(outcomes["no"], rel=0.05)


def test_rows(tmp_path):
    _, result, rows = run(tmp_path, warmup=0.2)
    assert list(rows[0]) == ["stage", "step", "steps", "tokens", "loss", "kl", "lr", "grad_norm", "tokens_per_second", "time"]
    assert [row["step"] for row in rows] == list(range(1, 11)) and [row["tokens"] for row in rows] == list(range(32, 352, 32))
    assert rows[0]["lr"] == pytest.approx(0.01) and rows[-1]["lr"] == pytest.approx(0.002)
    assert all(type(row["loss"]) is float and row["loss"] == row["kl"] for row in rows)
    assert result.losses["kl"] == pytest.approx(sum(row["kl"] for row in rows) / 10)


def test_two_runs_are_equal_and_flags_come_back(tmp_path):
    outcomes = []
    for name in ("one", "two"):
        torch.manual_seed(len(outcomes))  # of no influence
        model = student().train()
        model.model.embed_tokens.weight.requires_grad_(False)
        state = torch.get_rng_state()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        _, _, rows = run(tmp_path / name, model)
        assert torch.get_rng_state().equal(state) and [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(module.training for module in model.modules()) and all(parameter.grad is None for parameter in model.parameters())
        outcomes.append(([timeless(row) for row in rows], {name: value.tolist() for name, value in mixers(model).items()}))
    assert outcomes[0] == outcomes[1]


def test_settings_of_accelerate_that_the_loop_does_not_have_change_nothing(tmp_path, monkeypatch):
    """A stage's batch is one optimiser step: there are no gradients to accumulate, hence none to divide."""
    wanted = [timeless(row) for row in run(tmp_path / "plain")[2]]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert [timeless(row) for row in run(tmp_path / "four")[2]] == wanted


class Crash(Exception):
    pass


def crash_at(step, rows=None):
    """A log that keeps its rows in `rows` and raises at `step`."""
    rows = [] if rows is None else rows

    def log(row):
        rows.append(row)
        if row["step"] == step:
            raise Crash

    return log


@pytest.mark.parametrize("at", [1, 4, 10])
def test_resume_after_a_crash_in_this_process(tmp_path, at):
    expected_model, expected, expected_rows = run(tmp_path / "unbroken", weight_decay=0.1)
    rows, rewound = [], []
    with pytest.raises(Crash):
        run(tmp_path / "broken", weight_decay=0.1, log=crash_at(at, rows), save_every_seconds=0)
    again = {"log": rows.append, "rewind": lambda *where: rewound.append(where), "save_every_seconds": 0}
    model, result, _ = run(tmp_path / "broken", weight_decay=0.1, **again)
    assert rewound == [("heal", at - 1)]
    del rows[at - 1]  # what `rewind` is told to drop
    assert [timeless(row) for row in rows] == [timeless(row) for row in expected_rows]
    assert result.losses == expected.losses
    assert all(value.equal(mixers(expected_model)[name]) for name, value in mixers(model).items())


def test_a_complete_stage_is_loaded_and_skipped(tmp_path):
    model, first, _ = run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]
    again, second, rows = run(tmp_path)
    assert second.skipped and not first.skipped and second.losses == first.losses and rows == []
    assert all(value.equal(mixers(model)[name]) for name, value in mixers(again).items())
    _, third, rows = run(tmp_path, resume=False)
    assert not third.skipped and len(rows) == 10


@pytest.mark.parametrize(
    "changes", [{"lr": 0.01}, {"seed": 1}, {"tokens": text(seed=1)}, {"repeat": 0.5}], ids=["lr", "seed", "text", "repeat"]
)
@pytest.mark.parametrize("finished", [True, False])
def test_checkpoints_of_another_run_are_refused(tmp_path, changes, finished):
    if finished:
        run(tmp_path)
    else:
        with pytest.raises(Crash):
            run(tmp_path, log=crash_at(4), save_every_seconds=0)
    with pytest.raises(UserError, match="other settings, other text or another model"):
        run(tmp_path, **changes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    before, seen = signal.getsignal(number), []

    def log(row):
        seen.append(row)
        if row["step"] == 3:
            signal.raise_signal(number)  # arrives after this step's own look at the flag: one more step

    with pytest.raises(Interrupted, match=f"after step 4 of 10. All is saved in {tmp_path}") as caught:
        run(tmp_path, log=log)
    assert caught.value.step == 4 and checkpoint.latest(tmp_path).name == "step-00000004" and signal.getsignal(number) is before
    _, result, rows = run(tmp_path)
    assert result.steps == 10 and rows[0]["step"] == 5


def test_a_second_signal_does_not_wait_and_threads_have_no_handlers():
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    entered = []
    thread = threading.Thread(target=lambda: entered.append(StopSignals().__enter__()))
    thread.start()
    thread.join()
    assert entered


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_the_step_and_saves_nothing_bad(tmp_path, value):
    model = student()
    good = logits_objective(model, same_weights(model, as_teacher), {"kl": 1.0})
    count = []

    def objective(batch, backward):
        count.append(0)
        return good(batch, backward) | ({"loss": value} if len(count) == 3 else {})

    with pytest.raises(UserError, match=f"step 3: loss is {value}.*lower lr"):
        run(tmp_path, model, objective=objective, save_every_seconds=0)
    assert checkpoint.latest(tmp_path).name == "step-00000002"
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (lambda model: {}, ["nothing to train"]),
        (lambda model: mixers(model.bfloat16()), ["bfloat16"]),
    ],
)
def test_refusals(tmp_path, make, problems):
    model = student()
    with pytest.raises(UserError) as caught:
        run(tmp_path, model, parameters=make(model))
    assert len(caught.value.problems) == len(problems)
    assert all(words in problem for words, problem in zip(problems, caught.value.problems, strict=True))


def test_an_objective_without_gradients_is_our_bug(tmp_path):
    with pytest.raises(RuntimeError, match="no trained parameter a gradient"):
        run(tmp_path, objective=lambda batch, backward: {"loss": 0.0})


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save = checkpoint.save_file

    def full(tensors, path):
        if "step-00000003" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000003: No space left on device"):
        run(tmp_path, save_every_seconds=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    _, _, rows = run(tmp_path)
    assert rows[0]["step"] == 3
