"""Choices of tasks with settings under one name, and names on the command line turned into tasks."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subquad.errors import UserError, raise_all
from subquad.evals import TASKS
from subquad.evals.harness import installed
from subquad.evals.local import kind_of, stem
from subquad.registry import check_name, nearest

# Files are looked up in the folder given with --benchmarks.
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    # Sized for three models of 135M parameters in under an hour on two CPU cores; docs/evals.md has the time of each part.
    "standard": {
        "perplexity": {"context": 2048, "windows": 4},
        "repeat": {"length": [256, 512, 1024], "samples": 2},
        "choice": {"files": ["arc_easy", "piqa", "copa", "hellaswag_1000"], "limit": 300},
        "pairs": {"files": ["blimp"], "limit": 100},
        "passkey": {"lengths": [512, 1024, 2048], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "samples": 2},
        "mqar": {"lengths": [128, 256, 512], "depths": [0.0, 0.5, 1.0], "samples": 4},
        "decode": {"contexts": [4096, 32768], "new_tokens": 16},
    },
    # A look in a few minutes, no files needed.
    "quick": {
        "perplexity": {"context": 1024, "windows": 2},
        "repeat": {"length": 512, "samples": 1},
        "passkey": {"lengths": [256, 1024], "depths": [0.0, 0.5, 1.0], "samples": 1},
        "mqar": {"lengths": [128], "depths": [0.0, 0.5, 1.0], "samples": 2},
    },
    # Everything that is generated, for recall and length alone.
    "recall": {
        "repeat": {"length": [512, 1024, 2048], "samples": 4},
        "passkey": {},
        "niah_single": {},
        "niah_multi_key": {},
        "niah_multi_value": {},
        "phonebook": {},
        "mqar": {},
        "induction": {},
        "copying": {},
        "selective_copying": {},
        "variable_tracking": {},
        "listops": {},
    },
}


def suite(name: str) -> dict[str, dict[str, Any]]:
    """A copy of a suite's tasks."""
    check_name("suite", name, SUITES)
    return {task: dict(settings) for task, settings in SUITES[name].items()}


def named(names: Sequence[str], folder: str | Path | None) -> dict[str, dict[str, Any]]:
    """Tasks for names: a row of TASKS, a file or a folder of files (a path, or a name in `folder`), blimp_PARADIGM, lm_eval:TASK, or a task of
    lm-evaluation-harness where that is installed. gsm8k and mmlu are files first. UserError names every name that is none of these."""
    tasks: dict[str, dict[str, Any]] = {}
    problems = []
    for name in names:
        path = None if name in TASKS and name not in ("gsm8k", "mmlu") else _path(name, folder)
        if path is not None:
            first = next(iter(sorted(file for file in path.iterdir() if file.is_file())), None) if path.is_dir() else path
            if first is None:
                problems.append(f"The folder {path} holds no files.")
                continue
            tasks.setdefault(kind_of(first), {"files": []})["files"].append(str(path))
        elif name in TASKS:
            tasks.setdefault(name, {})
        elif name.startswith("lm_eval:") or name in _harness_names():
            tasks.setdefault("lm_eval", {"tasks": []})["tasks"].append(name.removeprefix("lm_eval:"))
        else:
            files = local_names(folder)
            where = f"Files in {folder}: {', '.join(files)}." if files else "Give --benchmarks FOLDER for tasks from files."
            near = nearest(name, [*TASKS, *files, *_harness_names()])
            problems.append(f"Unknown eval task {name!r}.{near} Known: {', '.join(TASKS)}. {where}")
    raise_all(problems)
    if not tasks:
        raise UserError("--tasks: give at least one task.")
    return tasks


def with_files(tasks: dict[str, Any], folder: str | Path | None) -> dict[str, Any]:
    """`tasks` with the names of their files as paths: what is no path is looked up in `folder`. UserError with the nearest names."""
    problems, found = [], dict(tasks)
    for task, settings in tasks.items():
        if not isinstance(settings, dict) or not settings.get("files"):
            continue
        names = [settings["files"]] if isinstance(settings["files"], str) else settings["files"]
        paths = {name: _path(str(name), folder) for name in names}
        if lost := [name for name, path in paths.items() if path is None]:
            known = local_names(folder)
            hint = f" In {folder}: {', '.join(known)}." if known else " Give a path, or the folder they are in with --benchmarks."
            problems += [f"{task}.files: no file {name!r}.{nearest(name, known)}{hint}" for name in lost]
        found[task] = settings | {"files": [str(path) for path in paths.values()]}
    raise_all(problems)
    return found


def _path(name: str, folder: str | Path | None) -> Path | None:
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    wanted = [name, f"{name}_dev", f"{name}_test", *([f"blimp/{name.removeprefix('blimp_')}"] if name.startswith("blimp_") else [])]
    for candidate in wanted:
        place = folder / candidate
        if place.exists():
            return place
        found = sorted(place.parent.glob(f"{place.name}.*")) if place.parent.is_dir() else []
        if found:
            return found[0]
    return None


def local_names(folder: str | Path | None) -> list[str]:
    """Files and folders in a benchmarks folder, without suffixes; none without a folder. UserError when it is no folder."""
    if folder is None:
        return []
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"--benchmarks {folder}: no such folder. Give the one that holds the evaluation files, or leave it out.")
    return sorted({stem(path) for path in place.iterdir() if not path.name.startswith(".")})


@functools.cache
def _harness_names() -> list[str]:
    """Empty where lm-evaluation-harness is not installed; reading its thousands of task files takes seconds."""
    if not installed():
        return []
    from lm_eval.tasks import TaskManager

    return list(TaskManager().all_tasks)
