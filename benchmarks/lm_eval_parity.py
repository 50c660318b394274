"""lm-evaluation-harness twice, item by item: our models in memory against its own `hf` model on the saved teacher folder.

    python benchmarks/lm_eval_parity.py --arc arc_easy.jsonl --text wikitext2_valid.tokenized.txt [--student RUN/student] [--items 200] [--pages 4]

Three comparisons, each of log-likelihoods per choice (nats) or per page:
    teacher in memory, padded batches   against   lm_eval --model hf on the saved folder, batch 1
    teacher in memory, padded batches   against   teacher in memory, batch 1
    student in memory, padded batches   against   student in memory, batch 1      (with --student)
Needs the extra `eval`.
"""

import argparse
import itertools
import json
import re
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from subquad.evals.answers import Answers
from subquad.evals.harness import harness_model
from subquad.evals.local import read
from subquad.evals.models import loaded
from subquad.linearize.teacher import load_teacher
from subquad.verbs import open_student

PADDED, ALONE = 8192, 1  # tokens of a batch
TASKS = {
    "arc_easy": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:", "doc_to_target": "gold", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "wikitext": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip
METRICS = {"arc_easy": ("acc", "acc_norm"), "wikitext": ("word_perplexity", "bits_per_byte")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arc", required=True, help="JSON lines of query, choices, gold")
    parser.add_argument("--text", required=True, help="text whose pages start with a line ' = Title = '")
    parser.add_argument("--student", help="a student folder")
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--pages", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place), {"arc_easy": questions(asked.arc, asked.items), "wikitext": pages(asked.text, asked.pages)}, asked)


def compare(place: Path, rows: dict[str, list[dict]], asked: argparse.Namespace) -> None:
    teacher, tokenizer = load_teacher(asked.teacher)
    folder = place / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for task in TASKS:
        plain = run(place, task, rows, model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu", batch_size=1)
        padded = run(place, task, rows, model=in_memory("teacher", teacher, tokenizer, PADDED))
        alone = run(place, task, rows, model=in_memory("teacher", teacher, tokenizer, ALONE))
        say(task, "teacher padded ~ hf saved folder", padded, plain)
        say(task, "teacher padded ~ teacher alone", padded, alone)
        if asked.student:
            student, _ = open_student(Path(asked.student))
            padded = run(place, task, rows, model=in_memory("student", student, tokenizer, PADDED))
            alone = run(place, task, rows, model=in_memory("student", student, tokenizer, ALONE))
            say(task, "student padded ~ student alone", padded, alone)


def in_memory(name: str, model, tokenizer, batch_tokens: int):
    return harness_model(name, loaded(**{name: model})[name], tokenizer, Answers(), batch_tokens=batch_tokens)


def run(place: Path, task: str, rows: dict[str, list[dict]], **how) -> dict:
    """What simple_evaluate returns for one task over rows."""
    data = place / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[task]), encoding="utf-8")
    made = ConfigurableTask(config={
        "task": task, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(place / "cache")}, **TASKS[task],
    })  # fmt: skip
    return simple_evaluate(tasks=[made], bootstrap_iters=0, log_samples=True, task_manager=TaskManager(include_defaults=False), **how)


def say(task: str, what: str, one: dict, other: dict) -> None:
    """One line: items, largest distance of a log-likelihood, answers that differ, and the metrics of both."""
    pairs = list(zip(one["samples"][task], other["samples"][task], strict=True))
    numbers = [(a, b) for x, y in pairs for a, b in zip(likelihoods(x), likelihoods(y), strict=True)]
    metrics = METRICS[task]
    differ = sum(x[metric] != y[metric] for x, y in pairs for metric in metrics if isinstance(x.get(metric), float | int))
    both = "  ".join(f"{m} {value(one, task, m):.6f} {value(other, task, m):.6f}" for m in metrics)
    found = f"{len(pairs)} items, {len(numbers)} numbers, largest distance {max(abs(a - b) for a, b in numbers):.2e} nats"
    print(f"{task:9} {what:34} {found}, {differ} scores differ  {both}", flush=True)


def likelihoods(sample: dict) -> list[float]:
    flat = itertools.chain.from_iterable(sample["resps"])
    return [float(answer[0] if isinstance(answer, list | tuple) else answer) for answer in flat]


def value(result: dict, task: str, metric: str) -> float:
    return next(found for label, found in result["results"][task].items() if label.split(",")[0] == metric)


def questions(file: str, count: int) -> list[dict]:
    return [vars(item) | {"choices": list(item.choices)} for item in read("choice", file, count)[0].asked]


def pages(file: str, count: int) -> list[dict[str, str]]:
    text = Path(file).read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^ = [^=]+ = $", text, re.MULTILINE)] + [len(text)]
    return [{"page": text[a:b]} for a, b in itertools.islice(itertools.pairwise(starts), count)]


if __name__ == "__main__":
    main()
