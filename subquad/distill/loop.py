"""The one training loop. Read `run_stage` from top to bottom; what differs between stages comes in as values.

Resume is exact because nothing hidden is carried from step to step: batches and dropout are functions of (seed, step), the learning rate
is a function of the step, and a checkpoint holds the rest: trained weights, the optimiser's memory, the step.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn

from subquad.distill import checkpoint
from subquad.distill.data import Batches, derive_seed
from subquad.distill.lora import dropout_on
from subquad.distill.objectives import Objective
from subquad.distill.signals import Interrupted, StopSignals
from subquad.distill.stage import Stage
from subquad.errors import UserError, raise_all

DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
SMOOTH = 0.1  # weight of a new step in StageResult.losses


@dataclass(frozen=True)
class StageResult:
    """`losses`: running averages at the end, by name. `skipped`: the stage was complete already and only its weights were loaded."""

    stage: str
    steps: int
    tokens: int
    losses: dict[str, float]
    seconds: float
    skipped: bool = False


def run_stage(
    stage: Stage,
    *,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    batches: Batches,
    folder: Path | str,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    rewind: Callable[[str, int], None] = lambda stage, step: None,
    save_every_seconds: float = 120.0,
    resume: bool = True,
) -> StageResult:
    """Train `parameters`, in place, while everything else in `model` is frozen. Their names are their names in the checkpoints.

    folder: this stage's own checkpoints. With resume, a complete stage is loaded and skipped, an unfinished one continues from its newest
    checkpoint; without, it starts anew. `log` gets one row a step; `rewind(stage, step)` is called once before, and drops later rows.
    Raises Interrupted after SIGTERM or Ctrl-C (saved), UserError for a diverging loss, a full disk, a checkpoint of another run.
    """
    folder, names, began = Path(folder), list(parameters), time.perf_counter()
    # Given, because `accelerate config` may have left another number in the environment, which would divide every gradient.
    accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    _check(stage, model, parameters, batches, accelerator)
    mark = _fingerprint(stage, parameters, batches)
    if not resume and accelerator.is_main_process:
        checkpoint.clear(folder)
    accelerator.wait_for_everyone()

    done = checkpoint.done_folder(folder)
    if done.exists():
        state, weights = checkpoint.load(done, "model")
        _same_run(state, mark, folder)
        _put(parameters, weights)
        if accelerator.is_main_process:
            checkpoint.prune(folder, keep=0)  # a kill may have come between `done` and this
        return StageResult(stage.name, state["step"], state["tokens"], state["losses"], state["seconds"], skipped=True)

    model.to(accelerator.device)
    optimizer = accelerator.prepare(make_optimizer(stage, parameters.values()))
    step, losses, earlier = 0, {}, 0.0
    if newest := checkpoint.latest(folder):
        state, weights, moments = checkpoint.load(newest, "model", "optimizer")
        _same_run(state, mark, folder)
        _put(parameters, weights)
        checkpoint.load_optimizer(optimizer, names, moments)
        step, losses, earlier = state["step"], state["losses"], state["seconds"]
    if accelerator.is_main_process:
        rewind(stage.name, step)

    def progress() -> dict[str, Any]:
        return {"stage": stage.name, "step": step, "tokens": tokens, "losses": losses, "fingerprint": mark, "seconds": seconds}

    saved = time.perf_counter()
    with _only_these_train(model, parameters), torch.random.fork_rng(), StopSignals() as stop:
        while step < stage.steps:
            started = time.perf_counter()
            torch.manual_seed(derive_seed(batches.seed, stage.name, step, accelerator.process_index))  # dropout: nothing to store
            batch_BT = batches[step][accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
            lr = stage.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)

            with _precision(stage, accelerator):
                values = objective(batch_BT, accelerator.backward)
            values, stopping = _over_processes(accelerator, parameters, values, stop.requested)
            norm = float(accelerator.clip_grad_norm_(list(parameters.values()), stage.clip))
            _check_finite(stage, step + 1, values | ({} if accelerator.scaler else {"grad_norm": norm}), folder)  # fp16 skips such steps
            optimizer.step()

            step += 1
            tokens = step * stage.batch * stage.context
            losses = {name: smooth(losses.get(name), value, step) for name, value in values.items()}
            now = time.perf_counter()
            seconds = earlier + now - began
            if accelerator.is_main_process:
                speed = stage.batch * stage.context / (now - started)
                row = {"stage": stage.name, "step": step, "steps": stage.steps, "tokens": tokens, **values, "lr": lr, "grad_norm": norm}
                log(row | {"tokens_per_second": round(speed, 1), "time": round(seconds, 3)})

            if step < stage.steps and (stopping or now - saved >= save_every_seconds):
                if accelerator.is_main_process:
                    moments = checkpoint.optimizer_tensors(optimizer, names)
                    checkpoint.save(checkpoint.step_folder(folder, step), {"model": parameters, "optimizer": moments}, progress())
                    checkpoint.prune(folder)
                saved = time.perf_counter()
                if stopping:
                    accelerator.wait_for_everyone()
                    raise Interrupted(stage.name, step, stage.steps, folder)

        if accelerator.is_main_process:
            checkpoint.save(done, {"model": parameters}, progress())
            checkpoint.prune(folder, keep=0)
        accelerator.wait_for_everyone()
        if stopping:
            raise Interrupted(stage.name, step, stage.steps, folder)
    return StageResult(stage.name, step, tokens, losses, seconds)


def make_optimizer(stage: Stage, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with a group a parameter; weight decay on matrices, not on biases, scales and gates."""
    groups = [{"params": [each], "weight_decay": stage.weight_decay if each.ndim > 1 else 0.0} for each in parameters]
    fused = all(group["params"][0].device.type in ("cpu", "cuda") for group in groups)  # 27 M parameters, one CPU core: 62 ms instead of 142
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=fused)


def _precision(stage: Stage, accelerator: Accelerator) -> AbstractContextManager:
    """The stage's own choice; otherwise accelerate's (`accelerate launch --mixed_precision`)."""
    return torch.autocast(accelerator.device.type, torch.bfloat16) if stage.mixed_precision == "bf16" else accelerator.autocast()


@contextmanager
def _only_these_train(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """requires_grad for these alone (a frozen weight then costs no gradient), eval mode but for adapters' dropout: a teacher has none."""
    flags = [(parameter, parameter.requires_grad) for parameter in [*model.parameters(), *parameters.values()]]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False).eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        dropout_on(model)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _over_processes(
    accelerator: Accelerator, parameters: Mapping[str, nn.Parameter], values: dict[str, float], stop: bool
) -> tuple[dict[str, float], bool]:
    """Mean of gradients and values over all processes, and whether any of them was told to stop.

    Gradients are averaged here and not by a DistributedDataParallel wrapper, which wants one backward per forward of the wrapped model;
    layer-local transfer goes backward once per layer, inside the forward pass.
    """
    if all(parameter.grad is None for parameter in parameters.values()):
        raise RuntimeError("the objective gave no trained parameter a gradient")
    if accelerator.num_processes == 1:
        return values, stop
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    packed = torch.tensor([*values.values(), float(stop)], dtype=torch.float64, device="cpu").to(accelerator.device)
    *means, stops = accelerator.reduce(packed, "mean").tolist()
    return dict(zip(values, means, strict=True)), stops > 0


def smooth(before: float | None, value: float, step: int) -> float:
    """Plain average over the first 1 / SMOOTH steps, exponential after."""
    return value if before is None else before + max(1 / step, SMOOTH) * (value - before)


def _put(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _fingerprint(stage: Stage, parameters: Mapping[str, nn.Parameter], batches: Batches) -> str:
    """Says whether a checkpoint was made by the same stage, on the same text, for the same parameters."""
    shapes = {name: [list(parameter.shape), str(parameter.dtype)] for name, parameter in parameters.items()}
    value = {"stage": stage.model_dump(mode="json"), "batches": batches.fingerprint, "parameters": shapes}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _same_run(state: Mapping[str, Any], mark: str, folder: Path) -> None:
    if state.get("fingerprint") != mark:
        raise UserError(
            f"The checkpoints in {folder} were made with other settings, other text or another model. "
            "Choose another folder, or start anew without resuming (this removes them)."
        )


def _check(stage: Stage, model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Batches, accelerator: Accelerator) -> None:
    assert (batches.batch, batches.context, batches.repeat) == (stage.batch, stage.context, stage.repeat), "batches of another stage"
    problems = stage.unfit({str(p.dtype).removeprefix("torch.") for p in parameters.values()})
    if accelerator.distributed_type not in DATA_PARALLEL:
        problems.append(f"Training under {accelerator.distributed_type.value} is not supported. Use data parallel processes.")
    if stage.batch % accelerator.num_processes:
        problems.append(f"Stage {stage.name}: batch {stage.batch} is no multiple of the {accelerator.num_processes} processes.")
    raise_all(problems)


def _check_finite(stage: Stage, step: int, values: Mapping[str, float], folder: Path) -> None:
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"Stage {stage.name}, step {step}: {', '.join(bad)}. Training diverged; lower lr (now {stage.lr:g}) or raise warmup. "
            f"The last good checkpoint is in {folder}."
        )
