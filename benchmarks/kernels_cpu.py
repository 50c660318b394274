"""CPU speed of the ops, as ratios measured in one process: contenders take turns, one thread, the minimum of all rounds counts.

    OMP_NUM_THREADS=1 python benchmarks/kernels_cpu.py [--rounds 7] [--lengths 1024,4096,16384] [--json FILE]

Setting: batch 1, 8 heads, size 64, fp32 unless a row says bf16. `of matmul` is achieved / measured GFLOP/s, measured with a 1,024 x 1,024 matrix product
in turn with the rest. Times are processor time of the one thread, so that other programs cost cache and memory bandwidth but do not count as time.
flash-linear-attention's and transformers' own torch forms are compared where they are installed.
"""

import argparse
import inspect
import json
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from subquad.kernels import blocked, ops
from subquad.kernels.cpu import build
from subquad.kernels.features import mapped

B, H, D, WINDOW, SINKS = 1, 8, 64, 64, 4
CHUNK = 64


def minima(contenders: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of each, the best of `rounds`; everybody once per round, in an order drawn anew: nobody always follows who has just read the same tensors."""
    best: dict[str, float] = {}
    for fn in contenders.values():
        fn()  # compiles, allocates
    order = random.Random(0)
    for _ in range(rounds):
        for name, fn in order.sample(list(contenders.items()), len(contenders)):
            start = time.process_time()
            fn()
            best[name] = min(best.get(name, float("inf")), time.process_time() - start)
    return best


def inputs(T: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
    unit = F.normalize(k, dim=-1)
    given = {"q": q, "k": k, "v": v, "unit": unit, "fq": q.softmax(-1), "fk": k.softmax(-1)}
    given = {name: x.to(dtype) for name, x in given.items()}
    return given | {"g": F.logsigmoid(torch.randn(B, T, H) + 3), "beta": torch.rand(B, T, H), "mix": torch.zeros(B, T, H)}


def sdpa(x):
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flops(op: str, T: int) -> float:
    """Multiplications and additions that the chunkwise form needs: blocks above the diagonal are not counted."""
    half = (CHUNK + 8) / 2  # mean columns of a causal block computed 8 rows at a time
    linear = 4 * D * D + 4 * half * D
    return T * B * H * {"additive": linear, "delta": linear + 2 * D * D + 4 * half * D}[op]


FORWARD = {
    "additive": lambda x: ops.additive(x["q"], x["k"], x["v"]),
    "gated delta": lambda x: ops.delta(x["q"], x["unit"], x["v"], x["beta"], x["g"]),
    "window + sinks + linear": lambda x: ops.window_linear(
        x["q"], x["k"], x["v"], x["fq"], x["fk"], x["mix"], window=WINDOW, sinks=SINKS
    ),
}


def forward_rows(T: int, rounds: int) -> list[dict]:
    x = inputs(T)
    matrix = torch.randn(1024, 1024)
    contenders = {
        "matmul": lambda: matrix @ matrix,
        "sdpa": lambda: sdpa(x),
        **{name: lambda form=form: form(x) for name, form in FORWARD.items()},
        "additive, scalar decay": lambda: ops.additive(x["q"], x["k"], x["v"], x["g"]),
        "additive, torch": lambda: blocked.additive(x["q"], x["k"], x["v"]),
        "window + sinks": lambda: ops.banded(x["q"], x["k"], x["v"], window=WINDOW, sinks=SINKS),
        "hedgehog window + sinks + linear, map before": lambda: hedgehog(x, inside=False),
        "hedgehog window + sinks + linear, map inside": lambda: hedgehog(x, inside=True),
        **others(x),
    }
    with torch.no_grad():
        best = minima(contenders, rounds)
    peak = 2 * 1024**3 / best["matmul"]
    rows = []
    for name, seconds in best.items():
        row = {"op": name, "T": T, "ms": seconds * 1e3, "SDPA / this": best["sdpa"] / seconds}
        if name in ("additive", "gated delta"):
            row["of matmul"] = flops(name.split()[-1], T) / seconds / peak
        if name in ("transformers", "fla naive chunk"):
            row["this / gated delta"] = seconds / best["gated delta"]
        rows.append(row)
    return rows


def dtype_rows(T: int, rounds: int) -> list[dict]:
    """bf16 against fp32, by themselves: tensors of both are read by the same three ops. Among all contenders of `forward_rows` nearly each reads the fp32
    ones, which then lie in the caches: additive in fp32 takes 6 % less at 1,024 there than on tensors that nobody else reads."""
    given = {"": inputs(T), " bf16": inputs(T, torch.bfloat16)}
    with torch.no_grad():
        best = minima({name + dtype: lambda form=form, x=x: form(x) for name, form in FORWARD.items() for dtype, x in given.items()}, 3 * rounds)
    return [
        {"op": name, "T": T, "ms, fp32": best[name] * 1e3, "ms, bf16": best[f"{name} bf16"] * 1e3, "bf16 / fp32": best[f"{name} bf16"] / best[name]}
        for name in FORWARD
    ]


def hedgehog(x, inside: bool, m=ops):
    """Numbers of size 64 to 128 features, made before the op or in it."""
    fq, fk, more = (x["q"], x["k"], {"feature_map": "hedgehog_softmax"}) if inside else (*mapped("hedgehog_softmax", x["q"], x["k"]), {})
    return m.window_linear(x["q"], x["k"], x["v"], fq, fk, x["mix"], window=WINDOW, sinks=SINKS, **more)


def others(x) -> dict[str, Callable]:
    """The gated delta rule as others run it on a CPU."""
    found: dict[str, Callable] = {}
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next

        theirs = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
        found["transformers"] = lambda: theirs(x["q"], x["unit"], x["v"], x["g"], x["beta"], output_final_state=True)
    except ImportError:
        pass
    try:
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

        found["fla naive chunk"] = lambda: naive_chunk_gated_delta_rule(x["q"], x["unit"], x["v"], x["g"], x["beta"])
    except ImportError:
        pass
    return found


def saved_bytes(fn: Callable) -> int:
    total = 0

    def count(x):
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        fn()
    return total


def backward_rows(T: int, rounds: int) -> list[dict]:
    """Forward and backward, against the same chunk mathematics in torch under autograd."""
    x = {name: value.requires_grad_() for name, value in inputs(T).items()}
    window = dict(window=WINDOW, sinks=SINKS)
    forms = {
        "additive": lambda m: m.additive(x["q"], x["k"], x["v"]),
        "additive, scalar decay": lambda m: m.additive(x["q"], x["k"], x["v"], x["g"]),
        "gated delta": lambda m: m.delta(x["q"], x["unit"], x["v"], x["beta"], x["g"]),
        "window + sinks + linear": lambda m: m.window_linear(x["q"], x["k"], x["v"], x["fq"], x["fk"], x["mix"], **window),
    }
    pairs = {name: (lambda form=form: form(ops), lambda form=form: form(blocked)) for name, form in forms.items()}
    name = "hedgehog window + sinks + linear"
    pairs[name] = lambda: hedgehog(x, True), lambda: hedgehog(x, True, blocked)
    pairs[f"{name}; not torch but ops, map before"] = pairs[name][0], lambda: hedgehog(x, False)
    rows = []
    for name, (form, plain) in pairs.items():
        both = {"ours": lambda form=form: form()[0].sum().backward(), "torch": lambda plain=plain: plain()[0].sum().backward()}
        best = minima(both, rounds)
        saved = [saved_bytes(form), saved_bytes(plain)]
        rows.append({"op": f"{name}, forward + backward", "T": T, "ms": best["ours"] * 1e3, "torch / this": best["torch"] / best["ours"],
                     "saved MB": saved[0] / 1e6, "saved MB, torch": saved[1] / 1e6})  # fmt: skip
    return rows


def step_rows(rounds: int) -> list[dict]:
    """One token, 200 times a round."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, D) for _ in range(3))
    g, beta, state = -torch.rand(B, H), torch.rand(B, H), torch.zeros(B, H, D, D)
    wk, wv, memory = torch.randn(B, WINDOW, H, D), torch.randn(B, WINDOW, H, D), torch.zeros(B, H, D, D + 1)
    fq, fk, mix = torch.rand(B, H, D), torch.rand(B, H, D), torch.zeros(B, H)
    sinks = dict(sink_k_BNGK=torch.randn(B, SINKS, H, D), sink_v_BNGV=torch.randn(B, SINKS, H, D))
    forms = {
        "additive step": lambda m: m.additive_step(q, k, v, state, g),
        "delta step": lambda m: m.delta_step(q, k * 0.1, v, beta, state, g),
        "window + sinks + linear step": lambda m: m.window_linear_step(q, wk, wv, fq, mix, memory, fk, v, **sinks),
    }
    rows = []
    for name, form in forms.items():
        many = lambda m, form=form: [form(m) for _ in range(200)]  # noqa: E731
        with torch.no_grad():
            best = minima({"ours": lambda many=many: many(ops), "torch": lambda many=many: many(blocked)}, rounds)
        rows.append({"op": name, "T": 1, "ms": best["ours"] * 5, "torch / this": best["torch"] / best["ours"]})
    return rows


def _cell(x) -> str:
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"
    return "" if x is None else str(x)


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--backward-length", type=int, default=4096)
    parser.add_argument("--json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, instruction set {build.isa()}, {'C++' if not isinstance(build.library(), str) else 'no C++'}")
    parts = [step_rows(asked.rounds), backward_rows(asked.backward_length, asked.rounds)]
    for part in parts:
        print(table(part) + "\n", flush=True)
    for T in map(int, asked.lengths.split(",")):
        for rows in (forward_rows, dtype_rows):
            parts.append(rows(T, asked.rounds))
            print(table(parts[-1]) + "\n", flush=True)
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump([row for part in parts for row in part], file, indent=1)


if __name__ == "__main__":
    main()
