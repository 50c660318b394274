"""`subquad eval` and its words: the old form, tasks from files, what is kept, what is compared, and a user's mistakes."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from subquad import judging
from subquad.cli import app
from subquad.errors import UserError

QUIZ = [{"query": f"The {w} is", "choices": ["here", "far away", "under a stone"], "gold": i % 3} for i, w in enumerate("abcdef")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder, text_file):
    """A student folder, a benchmarks folder, a text."""
    folder = tmp_path_factory.mktemp("judging")
    call("linearize", teacher_folder, "--window", 8, "--sinks", 2, "--out", folder / "student")
    (folder / "bench").mkdir()
    (folder / "bench" / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in QUIZ))
    (folder / "bench" / "broken.jsonl").write_text(json.dumps(QUIZ[0]) + '\n{"query": "x", "choices": ["a", "b"], "gold": 9}\n')
    (folder / "novel.txt").write_text(text_file.read_text())
    return folder


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout, result.stderr


def judged(place, out, *more):
    return call("eval", place / "student", "--tasks", "quiz,repeat", "--benchmarks", place / "bench", "--data", place / "novel.txt",
                "--set", "repeat={length: 20, samples: 1}", "--out", out, *more)  # fmt: skip


def test_old_form_still_works(place):
    """A folder first, an option first, and the group's own words."""
    words = ["--data", place / "novel.txt", "--set", "perplexity={context: 32, windows: 1}", "--json"]
    for order in ([place / "student", *words], [*words, place / "student"], ["model", place / "student", *words]):
        code, stdout, stderr = call("eval", *order)
        assert code == 0, stderr
        assert [row["model"] for row in json.loads(stdout)] == ["teacher", "window", "student"]
    code, stdout, stderr = call("eval", place / "student", *words, "--models", "student", "--out", place / "kept")
    assert code == 0 and json.loads(stdout) == json.loads((place / "kept" / "results.json").read_text()), stderr
    assert "diagnose" in call("eval", "--help")[1] and "--tasks" in call("eval", "model", "--help")[1]


def test_results_are_kept_and_used_again(place, tmp_path):
    code, stdout, stderr = judged(place, tmp_path / "a", "--json")
    assert code == 0, stderr
    rows = json.loads(stdout)
    assert {row["metric"] for row in rows} == {"accuracy", "accuracy_norm", "repeat_perplexity"}
    assert rows == json.loads((tmp_path / "a" / "results.json").read_text())
    accuracy = next(row for row in rows if row["model"] == "student")
    assert accuracy["setting"] == "quiz, 6 of 6 items, 0-shot" and accuracy["n"] == 6 and "difference_stderr" in accuracy
    before = (tmp_path / "a" / "answers.jsonl").read_bytes()
    code, again, stderr = judged(place, tmp_path / "a", "--json")
    assert code == 0 and json.loads(again) == rows and "answers of an earlier call" in stderr
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == before, "nothing is asked twice"


def test_diff_is_paired(place, tmp_path):
    judged(place, tmp_path / "a", "--models", "teacher,student")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    items = json.loads((tmp_path / "b" / "items.json").read_text())
    items["accuracy"]["quiz, 6 of 6 items, 0-shot"]["student"] = [1.0] * 6
    (tmp_path / "b" / "items.json").write_text(json.dumps(items))
    rows = json.loads((tmp_path / "b" / "results.json").read_text())
    for row in rows:
        if (row["model"], row["metric"]) == ("student", "accuracy"):
            row["value"] = 1.0
    (tmp_path / "b" / "results.json").write_text(json.dumps(rows))
    found = {(row["model"], row["metric"]): row for row in judging.compare(tmp_path / "a", tmp_path / "b")}
    changed = found["student", "accuracy"]
    assert changed["how"] == "paired" and changed["difference"] == pytest.approx(1 - changed["before"])
    assert found["teacher", "accuracy"]["difference"] == 0 and found["teacher", "accuracy"]["better"] is None
    code, stdout, _ = call("eval", "diff", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0 and len(json.loads(stdout)) == len(found)
    assert call("eval", "diff", tmp_path / "a", tmp_path / "b")[0] == 0


def no_tokenizer(place):
    folder = place / "mute"
    if not folder.exists():
        shutil.copytree(place / "student", folder)
        for path in folder.glob("*token*"):
            path.unlink()
    return folder


MISTAKES = {
    "unknown task": (lambda p: ["--tasks", "quizz"], ["'quizz'", "Did you mean 'quiz'"]),
    "unknown suite": (lambda p: ["--suite", "standart"], ["Did you mean 'standard'"]),
    "broken lines": (lambda p: ["--tasks", "broken"], ["broken.jsonl, line 2", "gold 9"]),
    "no items left": (lambda p: ["--tasks", "quiz", "--limit", "0"], ["0 leaves no items"]),
    "no tokenizer": (lambda p: ["--tasks", "quiz", no_tokenizer(p)], ["holds no tokenizer. Save one beside the model"]),
    "suite without files": (lambda p: ["--suite", "standard"], ["no file 'arc_easy'"]),
    "unknown model": (lambda p: ["--tasks", "quiz", "--models", "techer"], ["Did you mean 'teacher'"]),
    "no model": (lambda p: ["--tasks", "quiz", "--models", ""], ["model of --models ''", "Known: student, teacher, window"]),
    "limit below one": (lambda p: ["--tasks", "quiz", "--limit", "-1"], ["choice.limit: expected a whole number of at least 1"]),
    "limit below one of a task by --set": (
        lambda p: ["--set", f"choice.files={p}/bench/quiz.jsonl", "--limit", "-1"],
        ["choice.limit: expected a whole number of at least 1"],
    ),
    "limit of nothing": (lambda p: ["--tasks", "passkey", "--limit", "3"], ["no task asked for takes one. Those that do: choice, "]),
    "limit of the default tasks": (lambda p: ["--limit", "3"], ["no task asked for takes one"]),
    "no task left": (lambda p: ["--set", "perplexity=null"], ["--set leaves out perplexity"]),
    "task without its files": (lambda p: ["--tasks", "gsm8k,mmlu"], ["gsm8k.files: give at least one file", "mmlu.files: give at least"]),
    "length too small": (lambda p: ["--tasks", "passkey", "--set", "passkey.lengths=[128]"], ["passkey.lengths", "128 are too few"]),
    "unknown setting": (lambda p: ["--tasks", "quiz", "--set", "choice.limt=3"], ["Did you mean 'limit'"]),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake(place, what):
    words, said = MISTAKES[what]
    words = words(place)
    folder = [] if len(words) == 3 and words[0] == "--tasks" else [place / "student"]
    code, stdout, stderr = call("eval", *folder, *words, "--benchmarks", place / "bench", "--data", place / "novel.txt")
    assert code == 2, stdout + stderr
    assert all(word in stderr for word in said), stderr
    assert "Traceback" not in stderr


def stray(path, value):
    path.write_text(json.dumps(value))
    return path


def test_other_words_and_their_mistakes(place, tmp_path):
    for words, said in (
        (["eval", "diff", tmp_path, tmp_path], "holds no results.json"),
        (["eval", "diff", stray(tmp_path / "about.json", {"model": "x"}), tmp_path], "a dict where a list of rows should be). Give results.json"),
        (["eval", "diff", stray(tmp_path / "rows.json", [{"model": "x"}]), tmp_path], "a row without metric, setting, value, ratio). Give results.json"),
        (["eval", "tasks", "--benchmarks", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["eval", place / "student", "--suite", "standard", "--benchmarks", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["eval", place / "student", "--tasks", "quiz", "--benchmarks", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["eval", "mixer", "gla,glaa"], "Did you mean 'gla'"),
        (["eval", "diagnose", place / "student", "--set", "widows=1"], "Did you mean 'windows'"),
        (["report", tmp_path], "no plan.json"),
    ):
        code, _, stderr = call(*words)
        assert code == 2 and said in stderr and "Traceback" not in stderr
    code, stdout, _ = call("eval", "tasks", "--benchmarks", place / "bench", "--json")
    assert code == 0 and "passkey" in json.loads(stdout)["tasks"] and json.loads(stdout)["files"] == ["broken", "quiz"]


def test_full_disk_keeps_earlier_results(place, tmp_path):
    """A file-size limit makes the system refuse to write, as a full disk does."""
    assert judged(place, tmp_path / "a", "--models", "student")[0] == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    words = ["subquad", "eval", str(place / "student"), "--tasks", "quiz,passkey", "--benchmarks", str(place / "bench"), "--data", str(place / "novel.txt"),
             "--models", "student", "--set", "passkey={lengths: [400], samples: 8}", "--out", str(tmp_path / "a")]  # fmt: skip
    limit = max(map(len, kept.values())) + 64
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {words!r}; from subquad.cli import main; main()"], capture_output=True, text=True, timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and ("space" in result.stderr or "large" in result.stderr), result.stderr
    assert all((tmp_path / "a" / name).read_bytes() == content for name, content in kept.items() if name != "answers.jsonl")
    assert judged(place, tmp_path / "a", "--models", "student")[0] == 0, "what was kept can still be used"


def test_a_model_alone(place, teacher_folder):
    code, stdout, stderr = call(
        "eval", teacher_folder, "--tasks", "quiz", "--benchmarks", place / "bench", "--data", place / "novel.txt", "--json"
    )
    assert code == 0, stderr
    assert {row["model"] for row in json.loads(stdout)} == {"model"}


def test_damaged_answers_are_named(tmp_path):
    from subquad.evals.answers import Answers

    (tmp_path / "answers.jsonl").write_text('["a", 1]\nnonsense\n["b", 2]\n')
    with pytest.raises(UserError, match="line 2: damaged"):
        Answers(tmp_path)
