"""The recipe: one YAML value that says which teacher, what becomes what, how it is healed, on what text, and how it is judged.

`load_recipe` reads a shipped name or a file, its parent, the variables and the `--set` values, and reports every problem at once.
A recipe that loads is complete: nothing in it is looked at later than here except files and weights.
"""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator

from subquad.distill.stage import Count, Number, Positive, Share, Stage, Whole
from subquad.errors import UserError, raise_all
from subquad.evals import not_whole, task_settings
from subquad.linearize.mixers import MIXERS, pieces
from subquad.registry import check_name, nearest, unknown_settings
from subquad.settings import apply_sets, expand, merge, read_yaml, validate

Heads = list[Whole | dict[Whole, list[Whole]]] | dict[Whole, list[Whole]]  # whole layers, {layer: [kv heads]}, or a list of both
Source = str | list[str]


class Section(BaseModel):
    """Every part of a recipe: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PlanSection(Section):
    """What becomes what; the arguments of `subquad.plan`."""

    mixer: str = "window"
    window: Count = 64  # tokens
    sinks: Whole = 4  # tokens
    exact: Heads | None = None  # kept as softmax attention
    layers: list[Whole] | None = None  # the layers to convert; None: all that can be
    options: dict[str, Any] = {}  # the mixer's own, for example feature_map

    @field_validator("mixer")
    @classmethod
    def _known(cls, name: str) -> str:
        check_name("mixer", name, MIXERS)
        return name

    @model_validator(mode="after")
    def _options(self):
        pieces(self.mixer, self.options)
        return self


class SelectSection(Section):
    """How the heads that stay exact are found. tokens, context, lr, price, repeat, batch belong to `gates`; heads belongs to `list`."""

    method: Literal["gates", "uniform", "list"]
    granularity: Literal["head", "layer"] = "head"
    heads: Heads | None = None
    tokens: Count = 40_960
    context: Annotated[Count, Field(ge=8)] = 1024
    batch: Count = 1
    lr: Positive = 0.05
    price: Annotated[Number, Field(ge=0)] = 0.05  # nats per token that keeping every head exact costs
    repeat: Share = 1.0  # share of sequences that are one passage twice
    mixed_precision: Literal["no", "bf16"] = "no"

    @model_validator(mode="after")
    def _heads_belong_to_list(self):
        if (self.heads is not None) != (self.method == "list"):
            raise ValueError("heads: needed by method list, and only there")
        return self

    @model_validator(mode="after")
    def _gates_are_a_stage(self):
        if self.method == "gates":
            self.stage()
        return self

    def stage(self) -> Stage:
        """The training of the gates as a stage, so that it has the loop's checkpoints, resume and log. UserError as for any other stage."""
        own = {key: getattr(self, key) for key in ("tokens", "context", "batch", "lr", "repeat", "mixed_precision")}
        return validate(Stage, {"name": "select", "train": "mixers", "inputs": "own", "losses": {"kl": 1.0}, **own})


class BudgetSection(Section):
    """How much of the teacher's KV bytes the student may keep: the share `kv_bytes` of them at `at` tokens."""

    kv_bytes: Annotated[Number, Field(gt=0, le=1)] = 0.20
    at: Count = 32_768


class DataSection(Section):
    """Where text comes from (sources: distill/data.py). Without `eval`, the last share `hold_out` of `train` is held out."""

    train: Source = "pydoc"
    eval: Source | None = None
    hold_out: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    allow_overlap: bool = False  # run although text to be judged on stands in the text to train on


class SampleSection(Section):
    """A greedy generation printed at the end."""

    prompt: str = "Explain in two sentences what a dictionary is in Python."
    new_tokens: Count = 64


class EvalTasks(RootModel[dict[str, dict[str, Any]]]):
    """{task: settings}: names of TASKS, and of their functions' parameters. null leaves a task out (how a child recipe drops one)."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tasks: Any) -> Any:
        if not isinstance(tasks, dict):
            return tasks
        tasks = {name: settings for name, settings in tasks.items() if settings is not None}
        raise_all([problem for name, settings in tasks.items() for problem in task_problems(name, settings)])
        return tasks


class Recipe(Section):
    """One whole conversion. `name` and `extends` are resolved on loading."""

    name: str = "recipe"
    about: str = ""
    teacher: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    seed: Whole = 0
    plan: PlanSection = PlanSection()
    select: SelectSection | None = None
    budget: BudgetSection | None = None
    stages: list[Stage] = []
    data: DataSection = DataSection()
    evals: EvalTasks = EvalTasks({})
    sample: SampleSection | None = None

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: list[Stage]) -> list[Stage]:
        names = [stage.name for stage in stages]
        problems = [
            f"two stages are called {name!r}; checkpoints are kept by name" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        moved = next((stage for stage in stages if stage.train != "mixers"), None)
        for stage in stages[stages.index(moved) + 1 :] if moved else []:
            if stage.inputs == "teacher":
                problems.append(
                    f"stage {stage.name!r} takes inputs: teacher after stage {moved.name!r} moved the weights that make them; put it before"
                )
        raise_all(problems)
        return stages

    @model_validator(mode="after")
    def _selection(self):
        problems = []
        if self.select and self.plan.exact is not None:
            problems.append("plan.exact and select both say which heads stay exact; give one of them")
        if self.select and self.select.method != "list" and not self.budget:
            problems.append(f"select.method {self.select.method} needs a budget, for example budget: {{kv_bytes: 0.20, at: 32768}}")
        raise_all(problems)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as JSON values, defaults filled in; loading it gives an equal recipe."""
        return {**self.model_dump(mode="json"), "stages": [_stage_dict(stage) for stage in self.stages]}

    def dump(self) -> str:
        """`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def _stage_dict(stage: Stage) -> dict[str, Any]:
    """Every setting that means something in this stage; Stage refuses the others when they are written out."""
    idle = {"lora"} if stage.train != "lora" else set()
    return stage.model_dump(mode="json", exclude=idle | ({"final_lr"} if stage.schedule == "constant" else set()))


def task_problems(name: str, settings: Any) -> list[str]:
    """What is wrong with one eval task's settings: an unknown task, no mapping, a key the task's function does not take, or no whole
    number where it takes one."""
    try:
        allowed = task_settings(name)
    except UserError as error:
        return list(error.problems)
    if not isinstance(settings, dict):
        return [f"{name}: expected a mapping of settings, got {settings!r}; {{}} takes the defaults. Settings: {', '.join(allowed)}."]
    return unknown_settings(settings, allowed, f"{name}.") + not_whole(name, settings)


# ---- loading -----------------------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    folder = Path(str(resources.files("subquad") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped name or a path. Raises UserError with the nearest shipped name."""
    path, names = Path(name_or_path), shipped()
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise UserError(f"No recipe file {path}.{nearest(path.stem, names)} Shipped recipes: {', '.join(names)}.")
        return path
    check_name("recipe", str(name_or_path), names)
    return names[str(name_or_path)]


def load_recipe(name_or_path: str | Path, sets: list[str] | None = None) -> Recipe:
    """A checked Recipe from a shipped name or a YAML file. Raises UserError with every problem and its path."""
    path = find_recipe(name_or_path)
    data = {"name": path.stem, **_with_parents(path, ())}
    return validate(Recipe, expand(apply_sets(data, sets or [])))


def rewritten(text: str) -> str:
    """The recipe a run folder holds, as it would be written today: a setting that is younger than the run stands at its default.

    Text that is no recipe (damaged, or of another version with other keys) comes back as it is.
    """
    try:
        return validate(Recipe, yaml.safe_load(text)).dump()
    except (UserError, yaml.YAMLError):
        return text


def _with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file merged over the one it `extends` (a shipped name, or a path beside it), and so on up."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(step.name for step in seen)}.")
    data = read_yaml(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: expected one recipe name or path, got {parent!r}.")
    beside = path.parent / parent
    inherited = _with_parents(beside if beside.is_file() else find_recipe(parent), (*seen, path.resolve()))
    inherited.pop("name", None)
    return merge(inherited, data)
