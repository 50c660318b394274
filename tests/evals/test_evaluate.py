"""evaluate(): order, ratios, what is refused before a model runs; the table and its JSON."""

import inspect
import io
import json
from contextlib import contextmanager

import helpers
import pytest
import torch
from rich.console import Console

from subquad.errors import UserError
from subquad.evals import TASKS, evaluate, harness, table
from subquad.evals.models import loaded
from subquad.evals.rows import METRICS, arrange, row, shown
from subquad.registry import lookup

TOKENS = torch.randint(257, (600,), generator=torch.Generator().manual_seed(2))
SMALL = {
    "repeat": {"length": [9, 20], "samples": 2},
    "perplexity": {"context": 30, "windows": 2},
    "by_position": {"context": 32, "windows": 1, "buckets": 2},
    "agreement": {"context": 30, "windows": 2},
    "decode": {"contexts": [16], "new_tokens": 2, "cache_bytes": lambda cache: 1000 * cache.get_seq_length()},
}


def three_models():
    return loaded(teacher=helpers.tiny_model(), window=helpers.tiny_model(seed=1), student=helpers.tiny_model(seed=2))


@contextmanager
def unopened():
    raise AssertionError("no model may run before everything is checked")
    yield


def test_order_and_ratios():
    lines = []
    rows = evaluate(three_models(), TOKENS, SMALL, lines.append)
    assert [row["model"] for row in rows] == ["teacher", "window", "student"] * (len(rows) // 3)
    assert list(dict.fromkeys(row["metric"] for row in rows)) == [
        "repeat_perplexity",
        "perplexity",
        "perplexity_by_position",
        "kl_to_teacher",
        "top1_agreement",
        "decode_tokens_per_second",
        "state_bytes",
    ]
    for teacher, window, student in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert teacher["setting"] == window["setting"] == student["setting"]
        if teacher["metric"] == "kl_to_teacher":
            assert teacher["ratio"] is window["ratio"] is None  # nothing can be divided by 0
            continue
        assert teacher["ratio"] == 1
        assert student["ratio"] == student["value"] / teacher["value"]
    assert all(set(row) == helpers.keys_of(row) for row in rows)
    assert any("repeat" in line for line in lines)


def test_same_numbers_again():
    tasks = {name: settings for name, settings in SMALL.items() if name != "decode"}
    assert evaluate(three_models(), TOKENS, tasks) == evaluate(three_models(), TOKENS, tasks)


def test_a_model_alone_has_no_ratios():
    rows = evaluate(loaded(student=helpers.tiny_model()), TOKENS, {"perplexity": SMALL["perplexity"]})
    assert [row["ratio"] for row in rows] == [None]


def test_one_object_can_be_two_models():
    """Teacher and student may be one model in two modes; the mode is on only while that model is measured."""
    model, scale = helpers.tiny_model(), []

    @contextmanager
    def louder():
        model.model.norm.weight.data.mul_(2)
        scale.append(2)
        yield model
        model.model.norm.weight.data.mul_(0.5)

    tasks = {name: SMALL[name] for name in ("perplexity", "agreement", "decode")}
    rows = evaluate({**loaded(teacher=model), "student": louder}, TOKENS, tasks)
    plain = evaluate(loaded(teacher=model), TOKENS, {"perplexity": SMALL["perplexity"]})
    assert rows[0]["value"] == plain[0]["value"] != rows[1]["value"]
    assert scale and next(row["value"] for row in rows if row["metric"] == "kl_to_teacher" and row["model"] == "student") > 0


def refusal(tasks, tokens=TOKENS, models=("teacher", "student")):
    with pytest.raises(UserError) as error:
        evaluate(dict.fromkeys(models, unopened), tokens, tasks)
    return str(error.value)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"perplexty": {}}, "Unknown eval task 'perplexty'. Did you mean 'perplexity'?"),
        ({"perplexity": {"contxt": 5}}, "perplexity.contxt: no such setting. Did you mean 'context'?"),
        ({"perplexity": {"context": 1}}, "perplexity.context: expected a whole number of at least 2, got 1"),
        ({"perplexity": {"context": True}}, "got True"),
        ({"perplexity": {"context": 16, "stride": 17}}, "would skip tokens"),
        ({"perplexity": {"context": 100, "windows": 7}}, "perplexity needs 700 tokens of text (7 x 100 tokens); the text has 600."),
        ({"perplexity": {"context": 100, "windows": 7}}, "Set perplexity.windows to at most 6"),
        ({"perplexity": {"context": 601, "windows": None}}, "perplexity needs 601 tokens of text (1 x 601 tokens); the text has 600."),
        ({"perplexity": {"context": 500, "windows": 3, "stride": 60}}, "needs 620 tokens of text (3 x 500 tokens, stride 60)"),
        ({"by_position": {"context": 32, "windows": 1, "buckets": 6}}, "can be halved into 5 ranges at most, got 6"),
        ({"repeat": {"length": [20, 601]}}, "repeat needs 601 tokens of text for one passage; the text has 600."),
        ({"repeat": {"samples": 0}}, "repeat.samples: expected a whole number of at least 1, got 0"),
        ({"agreement": {"context": 601}}, "agreement needs 2404 tokens"),
        ({"decode": {}}, "decode.cache_bytes: needed, but not given."),
    ],
)
def test_refused_before_a_model_runs(tasks, said):
    assert said in refusal(tasks)


def test_all_problems_at_once():
    said = refusal({"perplexity": {"context": 601}, "speed": {}, "repeat": {"lenght": 3}})
    assert all(part in said for part in ("perplexity needs", "Unknown eval task 'speed'", "repeat.lenght"))


def test_agreement_needs_two_models():
    assert "there is one only" in refusal({"agreement": SMALL["agreement"]}, models=("student",))
    assert "no model" in refusal({"perplexity": SMALL["perplexity"]}, models=())


def test_other_tokenizer_and_other_vocabulary():
    with pytest.raises(UserError, match="Token id 300 is outside the model's vocabulary of 257"):
        evaluate(three_models(), torch.full((600,), 300), {"perplexity": SMALL["perplexity"]})
    models = loaded(teacher=helpers.tiny_model(), student=helpers.tiny_model(vocab_size=260))
    with pytest.raises(UserError, match="student has 260 output tokens and the teacher 257"):
        evaluate(models, TOKENS, {"agreement": SMALL["agreement"]})


def test_more_tokens_than_positions():
    model = helpers.tiny_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=32)
    with pytest.raises(UserError, match="has 32 positions, 33 tokens are too many"):
        evaluate(loaded(teacher=model), TOKENS, {"perplexity": {"context": 33, "windows": 1}})


PROBLEM = '{"question": "How many?", "answer": "One. #### 1"}\n'
FILES = {
    "choice": ("quiz.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'),
    "pairs": ("pairs.jsonl", '{"sentence_good": "a", "sentence_bad": "b"}\n'),
    "mmlu": ("logic_dev.csv", "Is it?,a,b,c,d,1\n"),
    "gsm8k": ("problems.jsonl", 5 * PROBLEM),
    "rolling": ("text.txt", "a few words"),
}
MORE = {
    "generation": {"prompts": 2, "context": 100, "new_tokens": 8},
    "throughput": {"contexts": [16], "cache_bytes": lambda cache: 0},
    "lm_eval": {"tasks": ["arc_easy"]},
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_without_models_checks_only(name, tmp_path):
    task, settings = lookup("eval task", name, TASKS), {**SMALL.get(name, {}), **MORE.get(name, {})}
    if name == "lm_eval" and not harness.installed():
        pytest.skip("lm-evaluation-harness is not installed (extra eval)")
    if name in FILES:
        file, text = FILES[name]
        (tmp_path / file).write_text(text)
        settings["files"] = str(tmp_path / file)
    handed = dict.fromkeys(key for key in ("tokenizer", "answers") if key in inspect.signature(task).parameters)
    assert task({}, TOKENS, **handed, **settings) == []


# ---- the table -------------------------------------------------------------------------------------------------------------------------

ROWS = arrange(
    [
        row("teacher", "perplexity", "8 x 2048 tokens", 23.5),
        row("student", "perplexity", "8 x 2048 tokens", 24.44),
        row("teacher", "state_bytes", "4096 tokens", 94_371_840.0),
        row("student", "state_bytes", "4096 tokens", 18_874_368.0),
        row("teacher", "state_bytes", "32768 tokens", 1.51e9),
        row("student", "state_bytes", "32768 tokens", float("nan")),
        row("teacher", "top1_agreement", "4 x 1024 tokens", 1.0),
        row("student", "top1_agreement", "4 x 1024 tokens", 0.9312),
        row("teacher", "kl_to_teacher", "4 x 1024 tokens", 0.0),
        row("student", "kl_to_teacher", "4 x 1024 tokens", 0.0234),
    ],
    ["teacher", "student"],
)


def test_table_structure():
    built = table.build(ROWS)
    columns = {column.header: list(column.cells) for column in built.columns}
    assert columns == {
        "metric": ["perplexity ↓", "state (bytes) ↓", "", "top-1 agreement ↑", "KL to teacher (nats/token) ↓"],
        "setting": ["8 x 2048 tokens", "4096 tokens", "32768 tokens", "4 x 1024 tokens", "4 x 1024 tokens"],
        "teacher": ["23.50", "94.37 MB", "1.51 GB", "100.0 %", "0"],
        "student": ["24.44 (1.040×)", "18.87 MB (0.200×)", "not finite", "93.1 % (0.931×)", "0.02340"],
    }


def test_render_prints_and_says_what_the_ratio_is():
    console = Console(file=io.StringIO(), width=120)
    table.render(ROWS, console)
    assert "24.44 (1.040×)" in console.file.getvalue() and "ratio to teacher" in console.file.getvalue()
    table.render([], silent := Console(file=io.StringIO()))
    assert silent.file.getvalue() == ""


def test_a_missing_cell_is_empty():
    extra = arrange([*ROWS, row("third", "perplexity", "8 x 2048 tokens", 30.0)], ["teacher", "student", "third"])
    assert [list(column.cells) for column in table.build(extra).columns][-1] == ["30.00 (1.277×)", "", "", "", ""]


def test_json():
    assert json.loads(table.to_json(ROWS)) == ROWS
    assert ROWS[1] == {"model": "student", "metric": "perplexity", "setting": "8 x 2048 tokens", "value": 24.44, "ratio": 24.44 / 23.5}
    assert next(item for item in ROWS if item["setting"] == "32768 tokens" and item["model"] == "student")["value"] is None


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_shown(metric):
    assert all(shown(row("m", metric, "s", value)) for value in (0.0, 1e-9, 0.5, 999.96, 1234.5, 1e7, float("inf")))
