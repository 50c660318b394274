"""The toolkit's verbs one at a time, from Python and for the command line: convert, distill, evaluate (folders: judging.py). `run.py` joins them into a story."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedModel

import subquad
from subquad.distill.data import Tokens, load_documents
from subquad.distill.log import JsonLog
from subquad.distill.stage import Stage
from subquad.errors import UserError, raise_all
from subquad.evals import evaluate as run_tasks
from subquad.evals import handed, problems, task_settings
from subquad.evals.answers import Answers, fingerprint, key
from subquad.evals.fill import STOCK, auto
from subquad.evals.models import loaded
from subquad.folder import RunFolder, check_apart, check_folder
from subquad.healing import heal, stage_problems
from subquad.linearize import Plan, hub, linearize, plan, restore
from subquad.linearize.params import mixer_parameters
from subquad.linearize.state import MixerState, cache_bytes
from subquad.linearize.surgery import plan_of
from subquad.linearize.teacher import load_teacher, load_tokenizer
from subquad.progress import Reporter
from subquad.recipe import EvalTasks
from subquad.settings import apply_sets, validate

Rows = list[dict[str, Any]]  # model, metric, setting, value, ratio (to the teacher)
Text = Tokens | str | list[str]  # token ids, or a data source (distill/data.py)

STAGE = {"name": "kl", "train": "attention", "inputs": "own", "losses": {"kl": 1.0}, "tokens": 100_000, "context": 512, "lr": 1e-4}
DEFAULT_TASKS = {"perplexity": {}, "agreement": {}, "repeat": {}}


def evaluate(
    student: PreTrainedModel,
    data: Text,
    tasks: dict[str, dict[str, Any]] | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
    report: Reporter | None = None,
    answers: Answers | None = None,
) -> Rows:
    """Rows (model, metric, setting, value, ratio, and what else evals/rows.py names) of `student` on `data`, beside the teacher and the same
    window untrained.

    tasks: {name: settings}, names as in subquad.evals.TASKS. Without a teacher the student stands alone. tokenizer: for tasks that make or read
    texts. answers: what was answered before, and where to keep what is answered now (evals/answers.py).
    """
    report, tokens = report or Reporter(), as_tokens(data, tokenizer)
    models = {"student": student}
    if teacher is not None:
        teacher = teacher.to(student.device)
        models = {"teacher": teacher, "window": untrained_window(teacher, student), **models}
    return measure(models, tokens, check_tasks(tasks, tokens, tokenizer), tokenizer, report, answers)


def measure(
    models: dict[str, PreTrainedModel],
    tokens: Tokens,
    tasks: dict[str, dict[str, Any]],
    tokenizer: Any,
    report: Reporter,
    answers: Answers | None = None,
) -> Rows:
    """Rows of models in memory, the first of them the reference. A task that `answers` has seen finished is not run again."""
    answers = Answers(log=report.line) if answers is None else answers  # an empty one is false
    needing = [name for name in tasks if "tokenizer" in handed(name)]
    if tokenizer is None and needing:
        raise UserError(f"{', '.join(needing)}: needs a tokenizer; give tokenizer=...")
    marks = {name: answers.mark(model) for name, model in models.items()}

    def remember(name: str, settings: dict[str, Any], run: Any) -> Rows:
        own = {setting: value for setting, value in settings.items() if setting in tasks[name]}
        return answers.remember(key("rows", name, repr(sorted(own.items())), marks, tokens.sha256), run)

    return run_tasks(loaded(**models), tokens.long(), with_state(tasks, tokenizer, answers), report.line, remember)


def check_tasks(tasks: dict[str, dict[str, Any]] | None, tokens: Tokens, tokenizer: Any = None) -> dict[str, dict[str, Any]]:
    """`tasks` (DEFAULT_TASKS for None), if they can be run on so much text; every problem in one UserError. No model is needed; without a
    tokenizer the lengths of generated texts are not looked at."""
    tasks = validate(EvalTasks, DEFAULT_TASKS if tasks is None else tasks).root
    raise_all(problems(tokens.long(), with_state(tasks, tokenizer)))
    return tasks


def distill(
    student: PreTrainedModel,
    stages: list[Stage | dict[str, Any]],
    data: Text,
    *,
    folder: str | Path,
    tokenizer: Any = None,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    report: Reporter | None = None,
) -> PreTrainedModel:
    """Heal a converted model in place, stage by stage, and return it; resumes from the checkpoints in `folder`.

    teacher: asked by stages that move more than mixers or adapters. Without one, the student's own exact model is copied, which is the
    teacher as long as the student has not been trained before.
    """
    plan_of(student)
    checked = [stage if isinstance(stage, Stage) else validate(Stage, stage, f"stages.{i}.") for i, stage in enumerate(stages)]
    folder = Path(folder)
    check_folder(folder)
    tokens = as_tokens(data, tokenizer)
    raise_all(stage_problems(checked, tokens, bool(mixer_parameters(student)), student.dtype))
    if teacher is None and any(stage.train != "mixers" for stage in checked):
        teacher = restore(copy.deepcopy(student))
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoints = JsonLog(folder / "log.jsonl"), folder / "checkpoints"
    heal(student, checked, tokens, open_teacher=lambda: teacher, folder=checkpoints, log=log, seed=seed, report=report or Reporter())
    return student


# ---- the same on folders ---------------------------------------------------------------------------------------------------------------


def convert_folder(name: str, what: Plan, out: Path, *, overwrite: bool = False, report: Reporter) -> None:
    """Open the teacher `name`, convert it, save it untrained in `out`."""
    check_folder(out)
    hub.check_free(out, overwrite)
    check_apart(out, name)
    what.render(report.console)
    model, tokenizer = load_teacher(name)
    student = linearize(model, what)
    hub.save(
        student, out, tokenizer=tokenizer, provenance={"teacher": name, "trained_tokens": 0, "versions": versions()}, overwrite=overwrite
    )


def distill_folder(
    name: Path, data: list[str], out: Path, sets: list[str], *, teacher: str | None = None, overwrite: bool = False, report: Reporter
) -> None:
    """Heal the student in folder `name` with one stage (STAGE, changed by `sets`); `out` becomes a run folder.

    The run is of these very weights: another student or teacher under the same name is another run.
    """
    stage = validate(Stage, apply_sets(STAGE, sets))
    check_folder(out)
    check_apart(out, name, teacher)
    documents = load_documents(data)
    student, tokenizer = open_student(name)
    other = None if teacher is None and not trained_tokens(student) else original_teacher(student, teacher)
    story = {"student": str(name), "student_weights": fingerprint(student), "teacher": teacher}
    story |= {"teacher_weights": None if other is None else fingerprint(other), "data": data, "stages": [stage.model_dump(mode="json")]}
    folder = RunFolder(out, yaml.safe_dump(story, sort_keys=False), overwrite)
    folder.check()
    tokens = Tokens.from_documents(documents, tokenizer)
    raise_all(stage_problems([stage], tokens, bool(mixer_parameters(student)), student.dtype))
    with folder:
        if (folder / "student").is_dir():
            return report.line(f"{out} is finished.")
        distill(student, [stage], tokens, folder=out, teacher=other, report=report)
        story = {**student.subquad_provenance, "trained_tokens": trained_tokens(student) + stage.steps * stage.batch * stage.context}
        hub.save(student, folder / "student", tokenizer=tokenizer, provenance=story | {"versions": versions()})


def open_student(name: Path) -> tuple[PreTrainedModel, Any]:
    """(student, tokenizer) of a student folder."""
    if name.is_file() or not hub.is_student(name):
        out = "FOLDER" if name.is_file() else name
        raise UserError(
            f"{name} is no student folder. Make one: subquad linearize MODEL --out {out}, or subquad run RECIPE (then give DIR/student)."
        )
    return hub.load(name), load_tokenizer(str(name))


def original_teacher(student: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """The model called `name`, or the one the student's provenance names."""
    name = name or getattr(student, "subquad_provenance", {}).get("teacher")
    if not name:
        raise UserError("This student does not say what it was made from; name its teacher with --teacher.")
    return load_teacher(name)[0].eval()


def trained_tokens(student: PreTrainedModel) -> int:
    return getattr(student, "subquad_provenance", {}).get("trained_tokens", 0)


# ---- small parts -----------------------------------------------------------------------------------------------------------------------


def untrained_window(teacher: PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """The row every table has: the student's window and sinks in every layer its plan chose from, no exact heads, no training."""
    of = plan_of(student)
    layers = [layer.index for layer in of.layers if layer.mixer is not None or layer.why == "kept exact"]
    return linearize(twin(teacher), plan(teacher, mixer="window", window=of.window, sinks=of.sinks, layers=layers))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules around the same weights: converting it leaves `model` alone and costs no memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def as_tokens(data: Text, tokenizer: Any) -> Tokens:
    if isinstance(data, Tokens):
        return data
    if tokenizer is None:
        raise UserError("A data source needs tokenizer=... to become tokens.")
    return Tokens.from_documents(load_documents(data), tokenizer)


def with_state(tasks: dict[str, dict[str, Any]], tokenizer: Any = None, answers: Answers | None = None) -> dict[str, dict[str, Any]]:
    """Tasks with what is handed over from here: the tokenizer, the answers so far, and what decoding must know of converted layers (evals does
    not import linearize)."""
    pool = {
        "tokenizer": tokenizer,
        "answers": answers,
        "cache_bytes": cache_bytes,
        "fill": partial(auto, extend={**STOCK, MixerState: lengthen}),
    }

    return {
        name: {**{key: pool[key] for key in (*handed(name), *task_settings(name)) if key in pool}, **settings}
        for name, settings in tasks.items()
    }


def lengthen(layer: MixerState, tokens: int) -> None:
    """Bring a converted layer that has filled its window to where `tokens` more would: only exact heads grow, by what they hold."""
    if layer.keys.shape[1]:
        places = torch.arange(tokens, device=layer.keys.device) % layer.keys.shape[2]
        layer.extend_exact(layer.keys[:, :, places], layer.values[:, :, places])
    layer.length, layer.fewest = layer.length + tokens, layer.fewest + tokens
    layer.seen_B = None if layer.seen_B is None else layer.seen_B + tokens


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {"subquad": subquad.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
