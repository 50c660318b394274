"""Layer-local transfer of several presets against one pass of their common teacher.

Every layer holds a `Recorder` in the place of a mixer. It remembers the call (q, k, v, layer input); as soon as the teacher's output of the layer is
known, each preset's own mixer runs on that call, is compared and goes backward. Each preset has its own weights, optimiser and gradient clip, so
its steps are those of a stage {train: mixers, inputs: teacher, losses: {attention_output: 1}} that runs alone; only the teacher's pass is shared.

Key: B batch, T tokens, H query heads, V value size.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from subquad.distill.data import Batches
from subquad.distill.loop import make_optimizer, smooth
from subquad.distill.losses.attention import attention_output
from subquad.distill.stage import Stage
from subquad.linearize import Plan, linearize, plan, restore
from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.modes import calibrate, transfer
from subquad.linearize.seam import seams

clock = time.process_time  # CPU seconds: what a preset costs does not depend on what else the machine does


@dataclass
class Runner:
    """One preset in training. `mixers`: of the converted layers, in order."""

    name: str
    plan: Plan
    mixers: list[Mixer]
    seconds: float = 0.0  # of its own, without the teacher's pass
    loss: float | None = None  # of the attention outputs, running mean over layers and steps
    steps: int = 0
    failed: str = ""  # why it was taken out
    optimizer: torch.optim.Optimizer | None = None
    found: list[Tensor] = field(default_factory=list)  # losses of this step's layers

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for mixer in self.mixers for parameter in mixer.parameters()]


class Recorder(Mixer):
    """Stands where a mixer stands and remembers the call; what it returns is not looked at."""

    plain = True

    def __init__(self, runners: list[Runner], layer: int, instead_of: Mixer):
        super().__init__(instead_of.shape, instead_of.window, instead_of.sinks)
        self.runners, self.layer, self.total_kv_heads = runners, layer, instead_of.total_kv_heads

    def forward(self, call: AttentionCall) -> Tensor:
        self.call = call
        if call.calibrating:
            for runner in self.runners:
                runner.mixers[self.layer](replace(call))
        return call.q_BTGRK[..., :1]

    def learn(self, exact_BTHV: Tensor, padding: Tensor | None) -> None:
        """Forward, loss and backward of this layer for every runner."""
        for runner in self.runners:
            if runner.failed or runner.optimizer is None:
                continue
            began = clock()
            mixed_BTHV = runner.mixers[self.layer](replace(self.call)).flatten(2, 3)
            loss = attention_output(mixed_BTHV, exact_BTHV, padding)
            loss.backward()
            runner.found.append(loss.detach())
            runner.seconds += clock() - began
        del self.call


def make_runner(model: nn.Module, name: str, seed: int, **settings) -> Runner:
    """A preset with fresh mixers; the model is the teacher again afterwards."""
    what = plan(model, mixer=name, **settings)
    torch.manual_seed(seed)
    student = linearize(model, what)
    mixers = [seam.module.mixer.eval() for seam in seams(student)]
    restore(model)
    return Runner(name, what, mixers)


def put_in(model: nn.Module, runner: Runner) -> nn.Module:
    """The student of a runner; `restore(model)` takes it apart again."""
    student = linearize(model, runner.plan)
    for seam, mixer in zip(seams(student), runner.mixers, strict=True):
        seam.module.mixer = mixer
    return student


def train(
    model: nn.Module, runners: list[Runner], stage: Stage, batches: Batches, tick: Callable[[int], None] = lambda done: None
) -> float:
    """All runners through the stage, in place; tick(steps done). Returns the CPU seconds of the teacher's passes."""
    for runner in runners:
        if runner.parameters:
            runner.optimizer = make_optimizer(stage, runner.parameters)
    with recording(model, runners) as (student, recorders):

        def on_layer(index: int, mixed: Tensor, exact_BTHV: Tensor, padding: Tensor | None) -> None:
            with torch.enable_grad():
                recorders[index].learn(exact_BTHV, padding)

        calibrate(student, batches[0])
        began = clock()
        for step in range(stage.steps):
            with torch.no_grad(), transfer(student, on_layer):
                student.base_model(input_ids=batches[step], use_cache=False)
            for runner in runners:
                if runner.optimizer is not None and not runner.failed:
                    _update(runner, stage, step)
            tick(step + 1)
        return clock() - began - sum(runner.seconds for runner in runners)


@contextmanager
def recording(model: nn.Module, runners: list[Runner]):
    """(the teacher with recorders in the place of mixers, layer index -> recorder); the model is the teacher again afterwards."""
    model.requires_grad_(False).eval()
    student = linearize(model, plan(model, mixer="window", window=1, sinks=0))
    recorders = {}
    for layer, seam in enumerate(seams(student)):
        recorders[seam.index] = seam.module.mixer = Recorder(runners, layer, seam.module.mixer)
    try:
        yield student, recorders
    finally:
        restore(model)


@torch.no_grad()
def attention_errors(model: nn.Module, runners: list[Runner], ids_BT: Tensor) -> list[float]:
    """The transfer loss of each runner on ids_BT, mean over layers; nothing moves."""
    found: list[list[float]] = [[] for _ in runners]
    with recording(model, runners) as (student, recorders):

        def on_layer(index: int, mixed: Tensor, exact_BTHV: Tensor, padding: Tensor | None) -> None:
            with torch.no_grad():
                for runner, losses in zip(runners, found, strict=True):
                    out_BTHV = runner.mixers[recorders[index].layer](replace(recorders[index].call)).flatten(2, 3)
                    losses.append(float(attention_output(out_BTHV, exact_BTHV, padding)))

        with transfer(student, on_layer):
            student.base_model(input_ids=ids_BT, use_cache=False)
    return [sum(losses) / len(losses) for losses in found]


def _update(runner: Runner, stage: Stage, step: int) -> None:
    began = clock()
    loss, runner.found = float(torch.stack(runner.found).mean()), []
    norm = float(nn.utils.clip_grad_norm_(runner.parameters, stage.clip))
    if not math.isfinite(loss) or not math.isfinite(norm):
        runner.failed = f"diverged at step {step + 1} of {stage.steps}"
        return
    for group in runner.optimizer.param_groups:
        group["lr"] = stage.lr_at(step)
    runner.optimizer.step()
    runner.optimizer.zero_grad(set_to_none=True)
    runner.steps = step + 1
    runner.loss = smooth(runner.loss, loss, runner.steps)
    runner.seconds += clock() - began
