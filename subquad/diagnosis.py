"""`subquad eval diagnose`: what each part of a student is worth, what each contributes, how close its attention maps are to the teacher's, and
checks that a student which is broken does not pass.

Key: B batch, T tokens, G key/value heads, R query heads each, P heads, S keys, D model size, V vocabulary.
"""

import json
import math
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from subquad.ablation import EVERYTHING, swapped, variants, window_of, with_sizes
from subquad.distill.data import Tokens, load_documents
from subquad.errors import UserError, raise_all
from subquad.evals.maps import entropy, map_kl, monotonicity
from subquad.evals.models import measuring
from subquad.evals.perplexity import by_position, perplexity
from subquad.evals.repeat import repeat
from subquad.evals.rows import Row, arrange, row
from subquad.evals.text import whole
from subquad.folder import check_folder, write_text
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.window import Window
from subquad.linearize.modes import as_teacher
from subquad.linearize.seam import LayerSeam, seams
from subquad.progress import Reporter
from subquad.registry import unknown_settings
from subquad.settings import apply_sets
from subquad.verbs import open_student, original_teacher

# layers: how many are restored one at a time, evenly spread (each costs a pass over all text); maps: tokens of the attention maps.
SETTINGS = {"context": 512, "windows": 2, "repeat": 256, "samples": 2, "layers": 4, "maps": 192, "steps": 24}
BEYOND = 32  # queries of the attention maps that have something beyond their window, at least
DEAD = 1e-3  # share of a layer's output norm below which a linear branch does nothing
SAME = 1e-2  # largest difference of log-probabilities between two ways to compute the same thing in fp32; broken students are off by whole nats


def diagnose_folder(
    folder: Path, data: list[str], teacher: str | None, sets: list[str], out: Path | None, report: Reporter
) -> dict[str, Any]:
    """Open a student and diagnose it; {"rows": [...], "findings": [sentences]}, written to out/diagnosis.json if `out` is given."""
    settings = checked(apply_sets({}, sets))
    if out is not None:
        check_folder(out)
    documents = load_documents(data)
    student, tokenizer = open_student(folder)
    tokens = Tokens.from_documents(documents, tokenizer).long()
    result = diagnose(student, tokens, original_teacher(student, teacher), settings, report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "diagnosis.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def checked(given: dict[str, Any]) -> dict[str, int]:
    """SETTINGS with the given values; UserError names unknown keys and values that are no whole numbers."""
    raise_all(unknown_settings(given, SETTINGS))
    return {**SETTINGS, **{key: whole(key, value, least=0 if key == "layers" else 1) for key, value in given.items()}}


def diagnose(
    student: PreTrainedModel,
    tokens: Tensor,
    teacher: PreTrainedModel | None,
    settings: dict[str, int] | None = None,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """{"rows": rows of evals/rows.py, "findings": what looks broken, in words}. tokens: [N] ids of any text."""
    settings, report = {**SETTINGS, **(settings or {})}, report or Reporter()
    if not seams(student):
        raise UserError("This model has no converted layers: there is nothing to diagnose.")
    # Maps must reach beyond every window, or a linear branch has nothing to do in them.
    settings["maps"] = max(settings["maps"], max(seam.module.mixer.window + seam.module.mixer.sinks for seam in seams(student)) + BEYOND)
    need = max(settings["context"] * settings["windows"], settings["maps"], settings["repeat"])
    if len(tokens) < need:
        raise UserError(
            f"diagnose needs {need} tokens of text; the text has {len(tokens)}. Give more --data, or lower context, windows, repeat or maps."
        )
    report.line("Checks")
    findings = checks(student, tokens, settings)
    report.line("Branches and attention maps")
    rows, more = branches(student, tokens, settings)
    findings += more
    report.line(maps_line(rows))
    report.line("Ablation")
    rows += ablations(student, tokens, settings, report)
    report.line("Positions")
    models = {"teacher": teacher, "student": student} if teacher is not None else {"student": student}
    curve = by_position(
        {name: lambda model=model: nullcontext(model) for name, model in models.items()}, tokens, context=settings["context"],
        windows=settings["windows"], buckets=min(5, settings["context"].bit_length() - 2),
    )  # fmt: skip
    return {"rows": rows + arrange(curve, list(models)), "findings": findings}


def maps_line(rows: list[Row]) -> str:
    """The rows of single heads in one line: hundreds of them are for JSON and the report."""
    far = [entry for entry in rows if entry["metric"] == "attention_kl" and entry["value"] is not None]
    if not far:
        return "  No attention maps: what this mixer computes is no weighting of tokens."
    worst = max(far, key=lambda entry: entry["value"])
    mean = sum(entry["value"] for entry in far) / len(far)
    return f"  KL of attention maps: {mean:.3g} nats a query over {len(far)} heads, {worst['value']:.3g} in layer {worst['layer']} head {worst['head']}"


# ---- ablation ----------------------------------------------------------------------------------------------------------------------------


def ablations(student: PreTrainedModel, tokens: Tensor, settings: dict[str, int], report: Reporter) -> list[Row]:
    """ablated_perplexity and ablated_repeat of the student without each of its parts; ratio to the whole student."""
    indices = [seam.index for seam in seams(student)]
    count = min(settings["layers"], len(indices))
    chosen = sorted({indices[round(i * (len(indices) - 1) / max(1, count - 1))] for i in range(count)})
    parts = {"student": lambda: nullcontext(student), **variants(student, chosen)}
    rows = []
    for metric, task, given in (
        ("ablated_perplexity", perplexity, {"context": settings["context"], "windows": settings["windows"]}),
        ("ablated_repeat", repeat, {"length": settings["repeat"], "samples": settings["samples"]}),
    ):
        found = task(parts, tokens, **given)
        base = next(entry["value"] for entry in found if entry["model"] == "student")
        for entry in found:
            what = "nothing taken away" if entry["model"] == "student" else entry["model"]
            made = row(
                "student", metric, f"{what}, {entry['setting']}", math.nan if entry["value"] is None else entry["value"], branch=what
            )
            rows.append({**made, "ratio": None if entry["value"] is None or not base else entry["value"] / base})
        report.line("  " + ", ".join(f"{entry['model']} {entry['value']:.4g}" for entry in found if entry["value"] is not None))
    return rows


# ---- what branches do --------------------------------------------------------------------------------------------------------------------


class Capture:
    """Inside the block every converted layer's call and output are kept."""

    def __init__(self, model: PreTrainedModel):
        self.seams, self.calls, self.outputs = seams(model), {}, {}

    def __enter__(self) -> "Capture":
        def keep(seam: LayerSeam):
            def hook(module, args, output):
                self.calls[seam.index], self.outputs[seam.index] = args[0], output

            return hook

        self.handles = [seam.module.mixer.register_forward_hook(keep(seam)) for seam in self.seams]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def branches(student: PreTrainedModel, tokens: Tensor, settings: dict[str, int]) -> tuple[list[Row], list[str]]:
    """branch_share of every layer, attention_kl, attention_entropy and monotonicity of every converted head; and dead linear branches."""
    ids_1T = tokens[None, : settings["maps"]]
    with measuring(lambda: nullcontext(student)) as model, Capture(model) as seen:
        model(input_ids=ids_1T.to(model.device), use_cache=False)
        rows, dead = [], []
        for seam in seen.seams:
            call, out = seen.calls[seam.index], seen.outputs[seam.index].float()
            if type(seam.module.mixer) is not Window:
                share = linear_share(seam, call, out)
                rows.append(
                    row("student", "branch_share", f"linear branch, layer {seam.index}, {len(ids_1T[0])} tokens", share, layer=seam.index)
                )
                if share < DEAD:
                    dead.append(seam.index)
            rows += _map_rows(seam, call)
    told = f"The linear branch does nothing in layer{'s' * (len(dead) != 1)} {', '.join(map(str, dead))}: its share of the output is under {DEAD:.1%}."
    return rows, [told] if dead else []


def linear_share(seam: LayerSeam, call: AttentionCall, out_BTGRV: Tensor) -> float:
    """|out - window| / (|window| + |out - window|), summed over the queries that have something beyond their window: what the linear branch
    changes, whatever way a mixer combines the two."""
    window = window_of(seam)(call).float()
    beyond = slice(seam.module.mixer.window + seam.module.mixer.sinks, None)
    changed, kept = (out_BTGRV - window)[:, beyond].norm(dim=-1).sum(), window[:, beyond].norm(dim=-1).sum()
    return (changed / (changed + kept).clamp_min(1e-30)).item()


def effective_map(mixer, call: AttentionCall) -> Tensor | None:
    """The weights [P, T, S] a mixer gives to the first row's tokens, read off by handing it one-hot values; None for a mixer whose output is not
    a weighted sum of values."""
    T, V = call.k_BTGK.shape[1], call.v_BTGV.shape[-1]
    eye = F.pad(torch.eye(T, device=call.k_BTGK.device), (0, -T % V))[None, :, None].expand(1, -1, call.k_BTGK.shape[2], -1)
    own = {name: None if (x := getattr(call, name)) is None else x[:1].float() for name in ("plain_q_BTGRK", "plain_k_BTGK")}
    columns = []
    for values in eye.split(V, -1):  # a mixer's state holds values of its own size
        one = AttentionCall(
            q_BTGRK=call.q_BTGRK[:1].float(), k_BTGK=call.k_BTGK[:1].float(), v_BTGV=values, hidden_BTD=call.hidden_BTD[:1], scale=call.scale,
            fewest=T, softcap=call.softcap, sink_logit_GR=call.sink_logit_GR, **own,
        )  # fmt: skip
        columns.append(mixer(one))
    weights = torch.cat(columns, -1)[..., :T]
    v_TPV = call.v_BTGV[0].float().repeat_interleave(call.q_BTGRK.shape[3], 1)
    again = torch.einsum("tps,spv->tpv", weights[0].flatten(1, 2), v_TPV)
    linear = torch.allclose(again, mixer(first_row(call)).float()[0].flatten(1, 2), atol=1e-3, rtol=1e-3)
    return weights[0].permute(1, 2, 0, 3).flatten(0, 1) if linear else None


def first_row(call: AttentionCall) -> AttentionCall:
    """The first row of a call without padding or state."""
    rows = ("q_BTGRK", "k_BTGK", "v_BTGV", "hidden_BTD", "plain_q_BTGRK", "plain_k_BTGK")
    return replace(call, **{name: None if (x := getattr(call, name)) is None else x[:1] for name in rows})


def teacher_logits(call: AttentionCall) -> Tensor:
    """Causal scores [P, T, S] of exact attention on the student's own q and k."""
    q, k = call.q_BTGRK[0].float(), call.k_BTGK[0].float()
    logits = torch.einsum("tgrk,sgk->grts", q, k).flatten(0, 1) * call.scale
    if call.softcap:
        logits = call.softcap * (logits / call.softcap).tanh()
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1), float("-inf"))


def _map_rows(seam: LayerSeam, call: AttentionCall) -> list[Row]:
    weights = effective_map(seam.module.mixer, call)
    if weights is None:
        return []
    logits, first = teacher_logits(call), min(seam.module.mixer.window, weights.shape[1] - 2)
    teacher = logits.softmax(-1)
    distance, own, exact = (x[:, first:].mean(1).tolist() for x in (map_kl(teacher, weights), entropy(weights), entropy(teacher)))
    follows = monotonicity(logits, weights, first).mean(1).tolist()
    rows, groups = [], call.q_BTGRK.shape[3]
    for place in range(len(distance)):
        head = seam.soft[place // groups] * groups + place % groups
        setting = f"layer {seam.index} head {head}, queries {first}-{weights.shape[1] - 1}"
        where = {"layer": seam.index, "head": head}
        rows.append(row("student", "attention_kl", setting, distance[place], **where))
        rows += [row(name, "attention_entropy", setting, values[place], **where) for name, values in (("teacher", exact), ("student", own))]
        rows.append(row("student", "monotonicity", setting, follows[place], **where))
    return rows


# ---- checks ------------------------------------------------------------------------------------------------------------------------------


def checks(student: PreTrainedModel, tokens: Tensor, settings: dict[str, int]) -> list[str]:
    """Sentences about what cannot be right in a student, however it was trained."""
    with measuring(lambda: nullcontext(student)) as model:
        ids_1T = tokens[None, : settings["maps"]].to(model.device)
        return [*_identity(model, ids_1T), *_windows(model, ids_1T), *_steps(model, ids_1T, settings["steps"])]


def _identity(model: PreTrainedModel, ids_1T: Tensor) -> list[str]:
    """With a window as long as the text every converted layer must be exact attention: heads grouped, scaled and masked as the teacher's."""
    found = []
    with as_teacher(model):
        exact = _logprobs(model, ids_1T)
    for seam in seams(model):
        with _only(model, seam), with_sizes(seam, window=EVERYTHING):
            gap = (_logprobs(model, ids_1T) - exact).abs().max().item()
        if gap > SAME:
            found.append((seam.index, gap))
    if not found:
        return []
    worst = max(gap for _, gap in found)
    return [
        f"Given a window as long as the text, layers {', '.join(str(index) for index, _ in found)} are not the teacher's attention (log-probabilities "
        f"differ by up to {worst:.2g} nats): heads are grouped wrongly, or scale or mask differ."
    ]


def _only(model: PreTrainedModel, kept: LayerSeam):
    """Every layer but one with exact attention."""
    stack = ExitStack()
    for seam in seams(model):
        if seam is not kept:
            stack.enter_context(swapped(seam, window_of(seam, window=EVERYTHING)))
    return stack


def _windows(model: PreTrainedModel, ids_1T: Tensor) -> list[str]:
    """The window branch must see exactly the tokens the plan says, and the mixer must run with the plan's numbers."""
    planned = {layer.index: layer for layer in model.subquad_plan.converted}
    found = []
    with Capture(model) as seen:
        model(input_ids=ids_1T, use_cache=False)
    for seam in seen.seams:
        layer, mixer = planned[seam.index], seam.module.mixer
        if (mixer.window, mixer.sinks) != (layer.window, layer.sinks):
            found.append(
                f"layer {seam.index} runs with window {mixer.window} and {mixer.sinks} sinks, the plan says {layer.window} and {layer.sinks}"
            )
            continue
        weights = effective_map(mixer if type(mixer) is Window else window_of(seam), seen.calls[seam.index])
        if weights is None:
            continue
        places = torch.arange(weights.shape[-1], device=weights.device)
        back = places[:, None] - places
        allowed = (back >= 0) & ((back < layer.window) | (places < layer.sinks))
        wrong = (weights > 0).any(0) != allowed
        # A weight that underflows to 0 is no proof; a query that sees too much, or that misses a whole place for every head, is.
        if bool(((weights > 1e-6).any(0) & ~allowed).any()) or wrong[:, places].sum() > allowed.sum() * 0.01:
            query = int(wrong.any(1).nonzero()[0])
            seen_places = int((weights[:, query] > 0).any(0).sum())
            found.append(f"layer {seam.index}: query {query} sees {seen_places} tokens, the plan says {int(allowed[query].sum())}")
    return [f"The window is not the plan's: {'; '.join(found[:3])}{' ...' if len(found) > 3 else ''}."] if found else []


def _steps(model: PreTrainedModel, ids_1T: Tensor, steps: int) -> list[str]:
    """A prefill and then one token at a time must give what one pass gives: states and windows are carried on."""
    whole_1TV = _logprobs(model, ids_1T)
    start = max(1, ids_1T.shape[1] - steps)
    cache = DynamicCache(config=model.config)
    parts = [ids_1T[:, :start], *ids_1T[:, start:].split(1, dim=1)]
    logits = torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)
    gap = (logits.float().log_softmax(-1) - whole_1TV).abs().amax(-1)[0]
    if gap.max() <= SAME:
        return []
    first = int((gap > SAME).nonzero()[0])
    return [
        f"Token by token the student says something else than in one pass (from token {first} on, log-probabilities differ by up to "
        f"{gap.max().item():.2g} nats): its state or its window is not carried from call to call."
    ]


def _logprobs(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    return model(input_ids=ids_1T, use_cache=False).logits.float().log_softmax(-1)
