"""The report of a run: every section, valid HTML that loads nothing, readable without colour or sight, and a card that validates."""

import json
import re
import shutil
import subprocess

import helpers
import pytest
from huggingface_hub import ModelCard

from subquad.errors import UserError
from subquad.evals.rows import arrange, row
from subquad.linearize import hub, linearize, plan
from subquad.report import write
from subquad.report.collect import collect
from subquad.report.page import render

SECTIONS = ["converted", "recovery", "recall", "positions", "speed", "ablation", "training", "provenance", "limits", "loading"]
MODELS = ["teacher", "window", "student"]


def rows():
    made = []
    for place, model in enumerate(MODELS):
        made += [
            row(model, "perplexity", "2 x 32 tokens", 20.0 + place),
            row(model, "state_bytes", "64 tokens", 1e6 / (place + 1), length=64),
        ]
        made.append(
            row(
                model,
                "accuracy",
                "quiz, 9 of 9 items, 0-shot",
                0.5,
                stderr=0.1,
                chance=0.5,
                n=9,
                solvable=False,
                difference=-0.1,
                difference_stderr=0.05,
            )
        )
        made.append(row(model, "accuracy_by_paradigm", "BLiMP one, 3 pairs", 0.6, stderr=0.1))
        for length in (64, 1024):
            made.append(row(model, "decode_tokens_per_second", f"{length} tokens, 2 steps, 1 thread", 10.0 + place, length=length))
            made += [
                row(
                    model,
                    "accuracy_by_depth",
                    f"passkey, {length} tokens, depth {d:g}",
                    d / (place + 1),
                    task="passkey",
                    length=length,
                    depth=d,
                )
                for d in (0.0, 1.0)
            ]
        made += [row(model, "perplexity_by_position", f"positions {a}-{b} of 2 x 32 tokens", 30.0 - a / 4) for a, b in ((1, 15), (16, 31))]
    made.append(row("student", "crossover_tokens", "decode, 64 to 1024 tokens", 300.0))
    return arrange(made, MODELS)


def diagnosis():
    parts = [
        {**row("student", "ablated_perplexity", f"{what}, 2 x 32 tokens", value, branch=what), "ratio": value / 20}
        for what, value in (("nothing taken away", 20.0), ("sinks off", 25.0))
    ]
    heads = [
        row("student", "attention_kl", "layer 0 head 0, queries 8-31", 0.4, layer=0, head=0),
        row("student", "monotonicity", "layer 0 head 0, queries 8-31", 0.9, layer=0, head=0),
    ]
    shares = [row("student", "branch_share", f"linear branch, layer {layer}, 32 tokens", 0.1, layer=layer) for layer in (0, 1, 2)]
    return {"rows": parts + heads + shares, "findings": ["Something <b>odd</b> & strange."]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with everything a report can show."""
    folder = tmp_path_factory.mktemp("report") / "mine"
    student = linearize(helpers.tiny_model(), plan(helpers.tiny_model(), mixer="gated_delta", window=8, sinks=2, exact={1: [0]}))
    (folder / "evals").mkdir(parents=True)
    story = {
        "teacher": "owner/tiny",
        "trained_tokens": 99,
        "overlap": [{"set": "held-out text", "items": 2, "overlapping_items": 1, "share": 0.03, "sha256": "a" * 64}],
    }
    hub.save(student, folder / "student", tokenizer=helpers.tiny_tokenizer(), provenance=story)
    (folder / "plan.json").write_text(json.dumps(student.subquad_plan.to_dict()))
    (folder / "recipe.yaml").write_text("teacher: owner/tiny\nabout: A <test> & more\n")
    (folder / "selection.json").write_text(json.dumps({"0": [0.1, 0.2], "1": [0.9, 0.1], "2": [0.3, 0.2]}))
    log = [
        {"stage": "transfer", "step": i, "steps": 3, "tokens": 32 * i, "loss": 2 / i, "layer 0": 3 / i, "layer 2": 1 / i, "lr": 0.1}
        for i in (1, 2, 3)
    ]
    log += [{"stage": "heal", "step": i, "steps": 3, "tokens": 64 * i, "loss": 1 / i, "kl": 1 / i, "lr": 0.1} for i in (1, 2, 3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"torn')
    (folder / "results.json").write_text(json.dumps(rows()))
    (folder / "evals" / "results.json").write_text(json.dumps(rows()[:3]))
    (folder / "evals" / "diagnosis.json").write_text(json.dumps(diagnosis()))
    return folder


@pytest.fixture(scope="module")
def html(run):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
    return write(run)["report"].read_text(encoding="utf-8")


def test_every_section_shows_its_numbers(html):
    assert re.findall(r'<section id="(\w+)"', html) == SECTIONS
    assert "Not measured" not in html
    for shown in (
        "20.00",
        "passkey, student",
        "3.00%",
        "sinks off",
        "Loss of each of 2 layers",
        '<th scope="col">layer 2</th>',
        "teacher not above chance",
        "300 tokens of context",
        "0.900",
        "A &lt;test&gt; &amp; more",
    ):
        assert shown in html, shown
    assert "Something &lt;b&gt;odd&lt;/b&gt; &amp; strange." in html


def test_nothing_is_loaded_from_elsewhere(html):
    addresses = re.findall(r'(?:src|href|action|data)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert all(address.startswith(("#", "data:,")) for address in addresses), addresses
    assert "<script" not in html and "@import" not in html


def test_html_is_valid(html):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed (extra dev)")
    parser = html5lib.HTMLParser(strict=True)  # raises at the first mistake
    parser.parse(html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_can_be_read_without_colour_or_sight(html):
    """WCAG 2.2: language, one h1, headings in order, pictures with a name and a description, table heads with a scope, contrast."""
    assert '<html lang="en">' in html and html.count("<h1>") == 1
    assert [int(level) for level in re.findall(r"<h(\d)", html)] == [1] + [2] * len(SECTIONS)
    pictures = re.findall(r"<svg[^>]*>", html)
    assert pictures and all('role="img"' in tag and "aria-labelledby" in tag for tag in pictures)
    assert len(re.findall(r"<title id=[^>]*>[^<]+</title><desc id=[^>]*>[^<]+</desc>", html)) == len(pictures)
    assert html.count("<table>") == html.count("<caption>") and '<th scope="col">' in html and '<th scope="row">' in html
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", html))
    for colours in (light, dark):
        for text in ("ink", "soft", "link"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        from subquad.report.pictures import STYLES

        assert all(contrast(style["color"], colours["paper"]) >= 3 for style in STYLES)


def contrast(a, b):
    """WCAG 2.2 contrast ratio of two #rrggbb colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_card_validates(run, html):
    card = ModelCard.load(run / "student" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"perplexity", "accuracy"}
    assert all(isinstance(result.metric_value, float) for result in card.data.eval_results)
    assert card.data.base_model == "owner/tiny" and card.data.model_name
    write(run)  # a second report replaces the section
    assert (run / "student" / "README.md").read_text().count("## Results") == 1


def test_run_without_evals(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
    shutil.copyfile(run / "plan.json", tmp_path / "plan.json")
    page = render(collect(tmp_path))
    assert page.count("Not measured") == 5 and "subquad eval diagnose" in page


def test_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="Did you mean"):
        collect(run / "student")
    with pytest.raises(UserError, match="No such folder"):
        collect(run, tmp_path / "none")
    shutil.copyfile(run / "plan.json", tmp_path / "plan.json")
    (tmp_path / "results.json").write_text("[1")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        collect(tmp_path)


@pytest.mark.parametrize("width", [1280, 390])
def test_opens_in_a_browser(run, html, tmp_path, width):
    """Headless Chromium: a screenshot without errors, and nothing wider than the window."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    picture = tmp_path / "page.png"
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]  # fmt: skip
    shot = subprocess.run(
        [*words, f"--window-size={width},2000", f"--screenshot={picture}", (run / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shot.returncode == 0 and picture.stat().st_size > 10_000
    assert "CONSOLE" not in shot.stderr, shot.stderr
