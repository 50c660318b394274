"""lm-evaluation-harness: our model in memory against its own `hf` model on the saved folder, item by item."""

import json

import helpers
import pytest
import torch

from subquad.errors import UserError
from subquad.evals import harness
from subquad.evals.answers import Answers
from subquad.evals.models import loaded
from subquad.linearize import linearize, plan

pytestmark = pytest.mark.skipif(not harness.installed(), reason="lm-evaluation-harness is not installed (extra eval)")

QUESTIONS = [{"query": f"Question: what comes after {w}?", "choices": ["nothing", "a river, and more of it", w], "gold": i % 3}
             for i, w in enumerate(["stone", "light", "seven rivers", "under", "a"])]  # fmt: skip


def local_task(tmp_path, kind, rows, **more):
    """A task object over local JSON lines, built as lm_eval builds its YAML tasks."""
    from lm_eval.api.task import ConfigurableTask

    data = tmp_path / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        **more,
    }
    return ConfigurableTask(config=config)


TASKS = {
    "choice": (
        QUESTIONS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}\nAnswer:",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "rolling": (
        [{"page": helpers.words(60, seed)} for seed in range(2)],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "generate": (
        [{"question": helpers.words(n, n), "answer": "x"} for n in (3, 9, 5)],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_parity_with_plain_lm_eval(tmp_path, kind):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # reading the thousands it comes with takes seconds
    rows, config = TASKS[kind]
    folder = helpers.save_teacher(tmp_path / "teacher", max_position_embeddings=128)
    model, tokenizer = helpers.tiny_model(max_position_embeddings=128), helpers.tiny_tokenizer()
    ours = harness.run_harness(
        loaded(teacher=model), tokenizer, [local_task(tmp_path, kind, rows, **config)], Answers(), task_manager=manager
    )["teacher"]
    plain = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, device="cpu", batch_size=1, bootstrap_iters=0, log_samples=True,
        tasks=[local_task(tmp_path, kind, rows, **config)], task_manager=manager,
    )  # fmt: skip
    name = f"local_{kind}"
    assert len(ours["samples"][name]) == len(rows)
    for a, b in zip(ours["samples"][name], plain["samples"][name], strict=True):
        assert a["doc_id"] == b["doc_id"]
        _same(a["resps"], b["resps"])
    for metric, value in plain["results"][name].items():
        if isinstance(value, float):
            assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric


def _same(a, b):
    """Nested answers: numbers within 1e-3 nats, everything else equal. Strings stand for pairs in some versions."""
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    elif isinstance(a, float | int) and not isinstance(a, bool):
        assert float(a) == pytest.approx(float(b), abs=1e-3)
    else:
        assert a == b


def test_generation_in_a_padded_batch_is_generation_alone():
    """Texts of many lengths, padded on the left, with the student's own caches; and one at a time."""
    model = helpers.tiny_model()
    model = linearize(model, plan(model, mixer="gated_delta", window=4, sinks=1))
    tokenizer = helpers.tiny_tokenizer()
    from subquad.evals.requests import generate

    prompts = [tokenizer.encode(helpers.words(count, count)) for count in (2, 5, 9)]
    opener = loaded(m=model)["m"]
    together = generate("m", opener, tokenizer, prompts, 6, [], Answers(), batch=3)
    assert together == [generate("m", opener, tokenizer, [prompt], 6, [], Answers(), batch=1)[0] for prompt in prompts]


def test_rows_have_paired_differences(tmp_path):
    rows, config = TASKS["choice"]
    models = loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(seed=1))
    from lm_eval.tasks import TaskManager

    task = local_task(tmp_path, "choice", rows, **config)
    found = harness.run_harness(models, helpers.tiny_tokenizer(), [task], Answers(), task_manager=TaskManager(include_defaults=False))
    made = harness._rows(found)
    student = next(row for row in made if row["model"] == "student" and "acc," in row["setting"])
    teacher = next(row for row in made if row["model"] == "teacher" and "acc," in row["setting"])
    assert student["n"] == 5 and student["difference"] == pytest.approx(student["value"] - teacher["value"])


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'arc_easy'"):
        harness.check_names(["arc_esy"])


def test_limit_and_names_are_checked():
    for settings, said in (({"tasks": []}, "at least one task"), ({"tasks": ["arc_easy"], "limit": 0}, "no items")):
        with pytest.raises(UserError, match=said):
            harness.lm_eval({}, torch.arange(3), tokenizer=None, answers=Answers(), **settings)
