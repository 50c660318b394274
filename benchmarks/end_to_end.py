"""A whole model, teacher and student in one process: layer-local transfer, prefill, decode, memory of prefill.

    python benchmarks/end_to_end.py smollm2-135m [--mixer window_linear] [--window 64] [--threads 1] [--rounds 3]

Lines: tokens/s of one transfer step (forward, and backward of every mixer) over the teacher's plain forward, at T = 1,024 and 4,096; tokens/s of a
prefill of 16,384 tokens by the converted model over the teacher's, each in one call or in parts of 1,024 tokens (transformers' `prefill_chunk_size`),
whichever is faster for it; decode steps per second with 32,768 tokens in the cache; peak memory of the student's prefill of 8,192 and 16,384 tokens,
both ways (Linux), in one call also with glibc's threshold fixed. Contenders take turns; the minimum counts (processor time with one thread, wall time otherwise).
"""

import argparse
import copy
import os
import subprocess
import sys
import time

import torch
from transformers import DynamicCache

import subquad
from subquad.distill.objectives import transfer_objective
from subquad.evals.speed import PeakMemory, decode
from subquad.linearize.modes import transfer
from subquad.linearize.params import mixer_parameters
from subquad.linearize.state import cache_bytes
from subquad.linearize.teacher import load_teacher

NO_LOSS = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # glibc's heap loses nothing between large tensors (docs/kernels.md, Memory of a prefill)


def minima(contenders: dict, rounds: int, clock) -> dict[str, float]:
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, fn in contenders.items():
            start = clock()
            fn()
            best[name] = min(best.get(name, float("inf")), clock() - start)
    return best


def converted(model, mixer: str, window: int):
    student = subquad.linearize(copy.deepcopy(model), subquad.plan(model, mixer=mixer, window=window, sinks=4))
    return student.eval().requires_grad_(False)


def transfer_rows(teacher, student, lengths, rounds, clock) -> list[str]:
    parameters = mixer_parameters(student)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    objective = transfer_objective(student, transfer, {"attention_output": 1.0})
    lines = []
    for T in lengths:
        ids = torch.randint(0, 40000, (1, T), generator=torch.Generator().manual_seed(T))

        def step(ids=ids):
            objective(ids, lambda loss: loss.backward())
            for parameter in parameters.values():
                parameter.grad = None

        def forward(ids=ids):
            with torch.no_grad():
                teacher(input_ids=ids, use_cache=False)

        best = minima({"teacher": forward, "transfer": step}, rounds, clock)
        lines.append(
            f"| transfer, T = {T} | {T / best['teacher']:.0f} | {T / best['transfer']:.0f} | {best['teacher'] / best['transfer']:.2f} |"
        )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return lines


def prefill(model, T: int, part: int):
    """A cache of T tokens, `part` tokens a call, and the logits of the last one."""
    ids = torch.randint(0, 40000, (1, T), generator=torch.Generator().manual_seed(T))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for some in ids.split(part, 1):
            model(input_ids=some, past_key_values=cache, use_cache=True, logits_to_keep=1)


def prefill_row(teacher, student, T: int, part: int, rounds: int, clock) -> str:
    ways = {(who, size): lambda model=model, size=size: prefill(model, T, size)
            for who, model in (("teacher", teacher), ("student", student)) for size in (T, part)}  # fmt: skip
    best = minima(ways, rounds, clock)
    for (who, size), seconds in best.items():
        print(f"prefill by the {who}, {size} tokens a call: {seconds:.1f} s", file=sys.stderr, flush=True)
    (t, t_part), (s, s_part) = (min((best[who, size], size) for size in (T, part)) for who in ("teacher", "student"))
    return f"| prefill, T = {T}, {t_part} and {s_part} tokens a call | {T / t:.0f} | {T / s:.0f} | {t / s:.2f} |"


def peak_megabytes(arguments: list[str], environment: dict[str, str]) -> float:
    """What one prefill takes above the loaded models, in a process of its own (Linux)."""
    ran = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True, env=os.environ | environment)
    return float(ran.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mixer", default="window_linear")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="1024,4096", help="of transfer")
    parser.add_argument("--prefill", type=int, default=16384)
    parser.add_argument("--part", type=int, default=1024, help="tokens a call of the prefill in parts")
    parser.add_argument("--decode", type=int, default=32768)
    parser.add_argument("--only-prefill", type=int, help="prefill by the student, print the megabytes it took, stop")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    teacher, _ = load_teacher(asked.model)
    teacher.eval().requires_grad_(False)
    student = converted(teacher, asked.mixer, asked.window)
    if asked.only_prefill is not None:
        prefill(student, 8, 8)
        peak = PeakMemory(torch.device("cpu"))
        prefill(student, asked.only_prefill, asked.part)
        taken = peak.bytes()
        print(float("nan") if taken is None else taken / 1e6)
        return
    print(f"{asked.model}, {asked.mixer}, window {asked.window}, {asked.threads} thread(s), fp32\n")
    print("| what | teacher tokens/s | student tokens/s | ratio |\n|---|---|---|---|", flush=True)
    for line in transfer_rows(teacher, student, map(int, asked.lengths.split(",")), asked.rounds, clock):
        print(line, flush=True)
    print(prefill_row(teacher, student, asked.prefill, asked.part, max(asked.rounds - 1, 1), clock), flush=True)
    if asked.decode:
        from contextlib import nullcontext

        models = {"t": lambda: nullcontext(teacher), "s": lambda: nullcontext(student)}
        rows = decode(models, torch.arange(1000) + 100, cache_bytes=cache_bytes, contexts=asked.decode, new_tokens=8)
        rate = {row["model"]: row["value"] for row in rows if row["metric"] == "decode_tokens_per_second"}
        print(
            f"| decode, {asked.decode} tokens in the cache | {rate['t']:.1f} | {rate['s']:.1f} | {rate['s'] / rate['t']:.2f} |", flush=True
        )
    more = ["--mixer", asked.mixer, "--window", str(asked.window), "--threads", str(asked.threads)]
    for part, environment in ((asked.prefill, {}), (asked.prefill, NO_LOSS), (asked.part, {})):
        sizes = (asked.prefill // 2, asked.prefill)
        asking = [[asked.model, *more, "--part", str(part), "--only-prefill", str(T)] for T in sizes]
        half, full = (peak_megabytes(arguments, environment) for arguments in asking)
        way = " ".join(["in one call" if part == asked.prefill else f"{part} tokens a call", *map("=".join, environment.items())])
        print(f"peak memory above the loaded models, {way}: {half:.0f} MB at {sizes[0]} tokens, {full:.0f} MB at {sizes[1]}", flush=True)


if __name__ == "__main__":
    main()
