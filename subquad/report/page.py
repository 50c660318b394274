"""The page: facts of a run -> sections with pictures and tables -> HTML (jinja2, page.html.j2)."""

import json
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from subquad.distill.log import LAYER
from subquad.evals.rows import METRICS, shown, with_error
from subquad.report import pictures
from subquad.report.collect import Facts

STANDARD = "subquad eval {run}/student --suite standard --benchmarks FOLDER --data TEXT --out {run}/evals"
POINTS = 400  # of a curve in a picture; its table has 20


@dataclass
class Table:
    caption: str
    columns: list[str]
    rows: list[list[str]]
    open: bool = False


@dataclass
class Section:
    """missing: what to run to get this section, where there is nothing to show."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""
    missing: str = ""


def render(facts: Facts) -> str:
    """The whole page as one HTML text; nothing in it is loaded from elsewhere."""
    sections = [converted(facts), recovery(facts), recall(facts), positions(facts), speed(facts), ablation(facts), training(facts), provenance(facts),
                limits(facts), loading(facts)]  # fmt: skip
    template = (resources.files("subquad.report") / "page.html.j2").read_text(encoding="utf-8")
    name = f"{facts.recipe.get('teacher', 'a softmax teacher')} with {facts.plan.mixer}"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        name=name, about=facts.recipe.get("about", ""), headline=headline(facts), sections=sections
    )


def headline(facts: Facts) -> list[tuple[str, str]]:
    """A few numbers for the top of the page."""
    plan, found = facts.plan, []
    total, soft = sum(layer.kv_heads for layer in plan.layers), sum(layer.soft_heads for layer in plan.layers)
    found.append(("KV heads kept exact", f"{total - soft} of {total}"))
    found.append(("memory at 32k tokens", f"{plan.student_bytes(32768) / plan.teacher_bytes(32768):.1%} of the teacher's"))
    for metric, label in (
        ("perplexity", "perplexity"),
        ("repeat_perplexity", "repeat (recall)"),
        ("decode_tokens_per_second", "decode speed"),
    ):
        rows = [row for row in facts.of(metric) if row["model"] == "student" and row["ratio"] is not None]
        if rows:
            found.append((f"{label}, {rows[-1]['setting']}", f"{rows[-1]['ratio']:.3f} × the teacher's"))
    return found


def converted(facts: Facts) -> Section:
    plan = facts.plan
    section = Section("converted", "What was converted")
    total, soft = sum(layer.kv_heads for layer in plan.layers), sum(layer.soft_heads for layer in plan.layers)
    added = plan.parameters_added()
    section.text.append(
        f"{soft} of {total} key/value heads became {plan.mixer} (window {plan.window} tokens, {plan.sinks} sinks); {total - soft} stay exact. "
        f"{added:,} parameters were added."
    )
    layers = [(layer.index, [_kind(layer, head) for head in range(layer.kv_heads)]) for layer in plan.layers]
    title = "Layers and key/value heads by kind"
    section.pictures.append(pictures.heads(title, f"{soft} of {total} heads are converted; the table below has every layer.", layers))
    section.tables.append(Table("Bytes of keys, values and states per sequence", ["context", "teacher", "student", "share"], [
        [f"{n:,}", f"{plan.teacher_bytes(n):,}", f"{plan.student_bytes(n):,}", f"{plan.student_bytes(n) / plan.teacher_bytes(n):.1%}"]
        for n in (4096, 32768, 131072)
    ], open=True))  # fmt: skip
    score = facts.scores or {}
    section.tables.append(Table("Heads by layer", ["layer", "exact heads", "converted heads", "selection scores"], [
        [str(layer.index), _list(head for head in range(layer.kv_heads) if _kind(layer, head) != "converted"),
         _list(head for head in range(layer.kv_heads) if _kind(layer, head) == "converted"), ", ".join(f"{value:.3f}" for value in score.get(layer.index, []))]
        for layer in plan.layers
    ]))  # fmt: skip
    return section


def recovery(facts: Facts) -> Section:
    section = Section("recovery", "Recovery")
    rows = facts.overall
    if not rows:
        section.missing = STANDARD.format(run=facts.run)
        return section
    section.text.append(
        "Teacher, the same window and sinks untrained, and the student on the same items. ± is the standard error of the mean. "
        "Difference: student minus teacher, paired over items. Recovery above chance: (student − chance) / (teacher − chance); it is left out "
        "where the teacher itself is not above chance by two standard errors, because such a task says nothing."
    )
    columns = ["metric", "setting", *facts.models, "student / teacher", "difference", "recovery above chance"]
    section.tables.append(Table("All measurements", columns, [_measured(facts.models, group) for group in _groups(rows)], open=True))
    paradigms = facts.of("accuracy_by_paradigm")
    if paradigms:
        section.tables.append(_by_model("BLiMP by paradigm", "paradigm", facts.models, paradigms))
    return section


def recall(facts: Facts) -> Section:
    section = Section("recall", "Recall by length and depth")
    rows = facts.of("accuracy_by_depth")
    if not rows:
        section.missing = STANDARD.format(run=facts.run)
        return section
    section.text.append(
        "Share of answers that are right, in per cent. Depth 0 is the start of the text, 1 its end. A window forgets everything but the end."
    )
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        lengths, depths = sorted({row["length"] for row in own}), sorted({row["depth"] for row in own})
        for model in facts.models:
            grid = [
                [
                    next((r["value"] for r in own if (r["model"], r["length"], r["depth"]) == (model, length, depth)), None)
                    for length in lengths
                ]
                for depth in depths
            ]
            said = "; ".join(f"{length} tokens: {_mean([line[i] for line in grid])}" for i, length in enumerate(lengths))
            section.pictures.append(pictures.heat(
                f"{task}, {model}: accuracy by depth and length", f"Mean over depths. {said}.", grid, [f"{depth:g}" for depth in depths],
                [pictures.short(length) for length in lengths], f"tokens ({task}, {model})", "depth",
            ))  # fmt: skip
        section.tables.append(Table(f"{task}: accuracy", ["tokens", "depth", *facts.models], [
            [f"{length:,}", f"{depth:g}", *(_cell(_at(own, model, length, depth)) for model in facts.models)]
            for length in lengths for depth in depths
        ]))  # fmt: skip
    return section


def positions(facts: Facts) -> Section:
    section = Section("positions", "Perplexity by position")
    rows = facts.of("perplexity_by_position") or [
        r for r in (facts.diagnosis or {}).get("rows", []) if r["metric"] == "perplexity_by_position"
    ]
    if not rows:
        section.missing = f"subquad eval {facts.run}/student --tasks by_position --data TEXT --out {facts.run}/evals"
        return section
    models = list(dict.fromkeys(row["model"] for row in rows))
    series = {model: _curve([row for row in rows if row["model"] == model]) for model in models}
    section.text.append("A model that uses its whole context gets better to the end of a document; one with a window levels off.")
    section.pictures.append(
        pictures.lines("Perplexity by position in the text", _said(series), series, "position (start of range)", "perplexity", log_x=True)
    )
    section.tables.append(_by_model("Perplexity by position", "positions", models, rows))
    return section


def speed(facts: Facts) -> Section:
    section = Section("speed", "Speed and memory")
    drawn = (("decode_tokens_per_second", "Decoding speed", "tokens per second"), ("state_bytes", "Bytes of keys, values and states", "bytes"),
             ("prefill_tokens_per_second", "Prefill speed", "tokens per second"), ("first_token_seconds", "Time to the first token", "seconds"),
             ("peak_bytes", "Peak memory of a prefill", "bytes"))  # fmt: skip
    for metric, title, unit in drawn:
        rows = [row for row in facts.of(metric) if row["value"]]
        series = {model: _points([row for row in rows if row["model"] == model]) for model in facts.models}
        series = {model: points for model, points in series.items() if points[0]}
        if series and max(len(xs) for xs, _ in series.values()) > 1:
            section.pictures.append(
                pictures.lines(f"{title} by context", _said(series), series, "tokens of context", unit, log_x=True, log_y=True)
            )
        if rows:
            section.tables.append(_by_model(title, "setting", facts.models, rows, open=not series))
    for row in facts.of("crossover_tokens"):
        section.text.append(
            f"{row['model']}: decodes faster than the teacher from about {row['value']:,.0f} tokens of context on ({row['setting']})."
        )
    if not section.tables:
        section.missing = f"subquad eval {facts.run}/student --tasks throughput --out {facts.run}/evals"
    else:
        section.text.append(
            "Measured on the machine that ran the evaluation, batch 1, models taking turns step by step. Ratios travel better than seconds."
        )
    return section


def ablation(facts: Facts) -> Section:
    section = Section("ablation", "What each part is worth")
    if facts.diagnosis is None:
        section.missing = f"subquad eval diagnose {facts.run}/student --data TEXT --out {facts.run}/evals"
        return section
    rows = facts.diagnosis["rows"]
    section.text += facts.diagnosis["findings"] or [
        "The checks (identity with the teacher, window, step by step against one pass, dead branches) found nothing."
    ]
    for metric in ("ablated_perplexity", "ablated_repeat"):
        own = [row for row in rows if row["metric"] == metric and row["value"] is not None]
        if own:
            names, values = [row["branch"] for row in own], [row["value"] for row in own]
            section.pictures.append(
                pictures.dots(
                    METRICS[metric].title, f"{names[0]}: {values[0]:.4g}. The table has the rest.", names, values, METRICS[metric].title
                )
            )
            section.tables.append(
                Table(
                    METRICS[metric].title,
                    ["taken away", "value", "ratio to the student"],
                    [[r["branch"], shown(r), f"{r['ratio']:.3f}" if r["ratio"] else ""] for r in own],
                    open=True,
                )
            )
    shares = [row for row in rows if row["metric"] == "branch_share"]
    if shares:
        series = {"linear branch": ([row["layer"] for row in shares], [row["value"] for row in shares])}
        section.pictures.append(
            pictures.lines("Share of the output norm that the linear branch makes", _said(series), series, "layer", "share")
        )
        section.tables.append(Table("Share of the linear branch", ["layer", "share"], [[str(row["layer"]), shown(row)] for row in shares]))
    maps = [row for row in rows if row["metric"] == "attention_kl"]
    if maps:
        heads = [(row["layer"], row["head"]) for row in maps]
        value = {(row["metric"], row["model"], row.get("layer"), row.get("head")): shown(row) for row in rows}
        columns = ["layer", "query head", "KL to the teacher's map", "entropy teacher", "entropy student", "weights follow logits"]
        keys = (
            ("attention_kl", "student"),
            ("attention_entropy", "teacher"),
            ("attention_entropy", "student"),
            ("monotonicity", "student"),
        )
        section.tables.append(
            Table(
                "Attention maps by head", columns, [[str(l), str(h), *(value.get((m, who, l, h), "") for m, who in keys)] for l, h in heads]
            )
        )
    return section


def training(facts: Facts) -> Section:
    section = Section("training", "Training")
    if not facts.log:
        section.text.append("Nothing was trained.")
        return section
    for stage, rows in facts.log.items():
        thin = rows[:: max(1, len(rows) // POINTS)]
        names = [
            name for name in rows[0] if name not in _NOT_LOSSES and isinstance(rows[0][name], float) and all(name in row for row in thin)
        ]
        layers = [name for name in names if name.startswith(LAYER)]
        curves = {name: ([row["tokens"] for row in thin], [row[name] for row in thin]) for name in names}
        whole = {name: curve for name, curve in curves.items() if name not in layers}
        section.pictures.append(pictures.lines(f"Loss of stage {stage}", _said(whole), whole, "tokens", f"loss ({stage})"))
        section.tables.append(_steps(f"Stage {stage}", rows, list(whole)))
        if layers:
            of = {int(name.removeprefix(LAYER)): curves[name] for name in layers}
            said = f"Loss of each of {len(of)} layers against tokens; the table has the numbers."
            section.pictures.append(pictures.fan(f"Loss of stage {stage} by layer", said, of, "tokens", f"loss ({stage})", "layer"))
            section.tables.append(_steps(f"Stage {stage} by layer", rows, layers))
    return section


def _steps(title: str, rows: list[dict[str, Any]], names: list[str]) -> Table:
    """About twenty rows of the log, the last one among them."""
    few = rows[:: max(1, len(rows) // 20)]
    few = few if few[-1] is rows[-1] else [*few, rows[-1]]
    return Table(title, ["step", "tokens", *names], [[str(r["step"]), f"{r['tokens']:,}", *(f"{r[n]:.4g}" for n in names)] for r in few])


_NOT_LOSSES = {"lr", "grad_norm", "tokens_per_second", "time", "step", "steps", "tokens", "open"}


def provenance(facts: Facts) -> Section:
    section = Section("provenance", "Provenance")
    known = facts.provenance
    said = {key: known[key] for key in ("teacher", "revision", "trained_tokens", "versions", "data_sha256") if key in known}
    section.tables.append(
        Table(
            "Where it comes from",
            ["what", "value"],
            [[key, json.dumps(value) if isinstance(value, dict) else str(value)] for key, value in said.items()],
            open=True,
        )
    )
    overlap = [*known.get("overlap", ()), *((facts.about or {}).get("overlap") or ())]
    if overlap:
        section.tables.append(Table("Runs of 13 words shared with the training text", ["set", "texts", "texts with overlap", "share of 13-grams", "SHA-256"], [
            [entry["set"], str(entry["items"]), str(entry["overlapping_items"]), f"{entry['share']:.2%}", entry["sha256"][:16]] for entry in overlap
        ], open=True))  # fmt: skip
    section.code = json.dumps(facts.recipe, indent=1, ensure_ascii=False, default=str)
    return section


def limits(facts: Facts) -> Section:
    section = Section("limits", "Known limits")
    section.text += ["No static cache, no assisted or speculative decoding (a recurrent state has no way back), no 4-D attention masks.",
                     "What stands further back than the window is remembered by exact heads and linear branches only: see the recall section."]  # fmt: skip
    unsolved = sorted({row["setting"] for row in facts.rows if row.get("solvable") is False})
    if unsolved:
        section.text.append(f"The teacher itself is not above chance on: {'; '.join(unsolved)}. These rows say nothing about the student.")
    return section


def loading(facts: Facts) -> Section:
    section = Section("loading", "How to load and run it")
    place = f"{facts.run.name}/student"
    section.code = (
        "import subquad\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")\n\n# on the command line\n'
        f"# subquad chat {place} --prompt 'Hello'"
    )
    return section


# ---- cells -------------------------------------------------------------------------------------------------------------------------------


def _kind(layer: Any, head: int) -> str:
    if layer.mixer is not None and head not in layer.exact:
        return "converted"
    return "exact" if layer.kind == "full_attention" or layer.mixer is not None else "the teacher's own window or recurrence"


def _groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["metric"], row["setting"]), []).append(row)
    order = list(dict.fromkeys(row["metric"] for row in rows))
    return sorted(groups.values(), key=lambda group: order.index(group[0]["metric"]))


def _of(group: list[dict[str, Any]], model: str) -> dict[str, Any] | None:
    return next((row for row in group if row["model"] == model), None)


def _at(rows: list[dict[str, Any]], model: str, length: int, depth: float) -> dict[str, Any] | None:
    return next((row for row in rows if (row["model"], row["length"], row["depth"]) == (model, length, depth)), None)


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else with_error(row)


def _by_model(title: str, what: str, models: list[str], rows: list[dict[str, Any]], open: bool = False) -> Table:
    """A line for each setting, a column for each model."""
    return Table(
        title, [what, *models], [[group[0]["setting"], *(_cell(_of(group, model)) for model in models)] for group in _groups(rows)], open
    )


def _measured(models: list[str], group: list[dict[str, Any]]) -> list[str]:
    student = _of(group, "student") or {}
    text = METRICS[group[0]["metric"]].text
    difference = student.get("difference")
    error = student.get("difference_stderr")
    above, ratio, ratio_error = student.get("recovery_above_chance"), student.get("ratio"), student.get("ratio_stderr")
    return [
        METRICS[group[0]["metric"]].title, group[0]["setting"], *(_cell(_of(group, model)) for model in models),
        "" if ratio is None else f"{ratio:.3f}" + (f" ± {ratio_error:.3f}" if ratio_error is not None else ""),
        "" if difference is None else f"{'−' if difference < 0 else '+'}{text(abs(difference))}" + (f" ± {text(error)}" if error is not None else ""),
        f"{above:.0%}" if above is not None else ("teacher not above chance" if student.get("solvable") is False else ""),
    ]  # fmt: skip


def _curve(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(start of each range, value), from settings such as 'positions 64-127 of ...'."""
    points = [(int(re.search(r"positions (\d+)", row["setting"]).group(1)), row["value"]) for row in rows if row["value"] is not None]
    return [x for x, _ in points], [y for _, y in points]


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(tokens, value); of several measurements at one length (other threads, another day) the last one."""
    points = {row.get("length") or int(row["setting"].split()[0]): row["value"] for row in rows}
    return sorted(points), [points[x] for x in sorted(points)]


def _said(series: dict[str, tuple[list[float], list[float]]]) -> str:
    return " ".join(f"{name}: from {ys[0]:.4g} at {xs[0]:g} to {ys[-1]:.4g} at {xs[-1]:g}." for name, (xs, ys) in series.items() if xs)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.0%}" if known else "not measured"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values) or "none"
