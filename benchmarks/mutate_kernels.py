"""Seed one bug at a time into the Triton kernels and see whether tests/interp notices.

    python benchmarks/mutate_kernels.py [--only NAME,..] [--quick] [--json FILE]

Every mutant is a copy of the kernels with one line changed; the interpreter tests run on it in a fork, the named tests first, and stop at the first
failure. A mutant that no test notices is a hole in the tests: it is printed at the end and the exit code is 1 below 95 %.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS, TESTS = Path("subquad/kernels/triton"), Path("tests/interp")
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(ROOT / TESTS), str(ROOT / "tests"), str(ROOT)]

import conftest  # noqa: F401 - the emulator, and the package without its heavy __init__
import pytest


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` at its `nth` occurrence in `file`; `tests` is a pytest -k expression that says where it should show."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    nth: int = 0


MUTANTS = [
    Mutant("causal mask without its diagonal", "pieces.py", "i[:, None] >= i[None, :])", "i[:, None] > i[None, :])", "additive and plain"),
    Mutant("causal mask dropped", "scan.py", "weights = tl.where(causal_mask(BT, REVERSE), weights, 0.0)", "weights = weights", "additive and plain"),
    Mutant("time runs forward in reverse", "scan.py", "i_t = chunks - 1 - n if REVERSE else n", "i_t = n", "additive and plain"),
    Mutant("scale missing", "scan.py", "mv, b_o * scale)", "mv, b_o)", "additive and plain"),
    Mutant("stale state: not faded", "scan.py", "            state *= fade\n", "            state *= 1.0\n", "additive and scalar"),
    Mutant("read and write decay exchanged", "scan.py", "read, write = ahead, back", "read, write = back, ahead", "additive and scalar"),
    Mutant("feature decay on the wrong axis", "scan.py", "state *= fade[:, None]", "state *= tl.sum(fade, 0)", "additive and vector"),
    Mutant("sequence starts at the row's start", "pieces.py", "start = tl.load(cu + i_n).to(tl.int64)", "start = tl.load(cu).to(tl.int64)", "additive and packed"),
    Mutant("sequence one token too long", "pieces.py", "- start).to(tl.int32)", "- start + 1).to(tl.int32)", "additive and packed"),
    Mutant("initial state of the wrong head", "scan.py", "(H // RS) + i_h // RS)", "(H // RS))", "additive"),
    Mutant("final state's gradient once per query head", "scan.py", "state = tl.where(i_h % RS == 0, state, 0.0)", "state = state", "additive and groups"),
    Mutant("keys of the wrong group", "scan.py", "k += (start_k * HK + i_h // RK) * YK", "k += (start_k * HK + i_h % HK) * YK", "additive"),
    Mutant("wrong stride of v", "scan.py", "oi, HK * V, ov, has_k", "oi, HK * K, ov, has_k", "additive and plain"),
    Mutant("tail not masked", "scan.py", "(t < length) & (t - shift_k >= skip_k)", "(t < length + 1) & (t - shift_k >= skip_k)", "additive and packed"),
    Mutant("one level of pairs missing", "scan.py", "vector_weights(b_q, b_k, c, BT, LEVELS,", "vector_weights(b_q, b_k, c, BT, LEVELS - 1,", "additive and vector"),
    Mutant("reference of a level off by one", "pieces.py", "== half - 1", "== half", "additive and vector"),
    Mutant("decay gradient without the token itself", "scan.py", "later + total - tl.cumsum(e, 0) + e", "later + total - tl.cumsum(e, 0)", "additive and scalar"),
    Mutant("decay gradient forgets later chunks", "scan.py", "            later += total\n", "            later += 0 * total\n", "additive and scalar"),
    Mutant("features of rows that do not exist", "features.py", "tl.where(has_row[:, None] & has_index[None, :], found, 0.0)", "found", "feature_maps_inside"),
    Mutant("a row's normaliser of one sign", "features.py", "            total += rest\n            rest", "            rest", "feature_maps_inside"),
    Mutant("normalisers of the signs exchanged", "features.py", "rest[:, None], plus[:, None])", "plus[:, None], rest[:, None])", "feature_maps_inside"),
    Mutant("largest feature of the padding", "features.py", "tl.where(seen, u, float(\"-inf\"))", "u", "limits"),
    Mutant("features without their floor", "features.py", "    if FLOOR > 0:\n        found = tl.maximum(found, FLOOR)\n", "", "limits"),
    Mutant("exponents without their clamp", "features.py", "u = tl.minimum(tl.maximum(u, -LIMIT * LOG2E), LIMIT * LOG2E)", "u = u", "limits", 1),
    Mutant("slope where the clamp holds", "features.py", "GAIN > LIMIT, 0.0, found)", "GAIN > LIMIT, found, found)", "limits"),
    Mutant("gradient of y without its gain", "features.py", "here, my, found * GAIN)", "here, my, found)", "feature_maps_inside"),
    Mutant("gradient of features without the mean", "features.py", "d_plus -= mean[:, None]", "d_plus -= 0 * mean[:, None]", "feature_maps_inside"),
    Mutant("weights' gradient without features at their floor", "features.py", "gained += FLOOR * tl.sum(held, 1)", "gained += 0.0 * mean", "limits"),
    Mutant("queries' weights dropped from values", "scan.py", "b_v *= tl.load(weight", "b_v *= 1 + 0 * tl.load(weight", "feature_maps_inside"),
    Mutant("queries' weights dropped from keys", "scan.py", "b_k *= tl.load(weight", "b_k *= 1 + 0 * tl.load(weight", "feature_maps_inside"),
    Mutant("padded features in a state", "features.py", "column % BY < Y", "column % BY < BY", "feature_maps_inside"),
    Mutant("one elimination step missing", "wy.py", "tl.static_range(1, LEVELS)", "tl.static_range(1, LEVELS - 1)", "delta"),
    Mutant("delta without beta in the right side", "wy.py", "right = (b_v - seen) * b_beta[:, None]", "right = b_v - seen", "delta"),
    Mutant("delta reads before it fades", "wy.py", "            seen *= ahead[:, None]\n", "            seen *= 1.0\n", "delta and scalar"),
    Mutant("delta's state gradient misses the correction", "wy.py", "state -= tl.dot(tl.trans(b_k), dr", "state -= 0 * tl.dot(tl.trans(b_k), dr", "delta"),
    Mutant("delta: gradient of A with its diagonal", "wy.py", "strictly = oi[:, None] > oi[None, :]", "strictly = oi[:, None] >= oi[None, :]", "delta"),
    Mutant("delta: last decay's gradient missing", "wy.py", "d_last + tl.sum(d_c, 0)", "tl.sum(d_c, 0)", "delta and scalar"),
    Mutant("delta: chunk's state one slot off", "wy.py", "slot = start // BT + i_n + i_t", "slot = start // BT + i_n + i_t + 1", "delta"),
    Mutant("window one token wider", "band.py", "(ahead <= 0) & (ahead > -window)", "(ahead <= 0) & (ahead >= -window)", "banded"),
    Mutant("window sees the future", "band.py", "exists[None, :] & (ahead <= 0)", "exists[None, :] & (ahead <= 1)", "banded"),
    Mutant("last block of the window missing", "band.py", "range(FROM, tl.cdiv(window + BT, BT))", "range(FROM, tl.cdiv(window, BT))", "banded"),
    Mutant("second block is the first one again", "band.py", "(low + BT) * G", "low * G", "window_linear and sinks"),
    Mutant("sinks seen while still in the window", "band.py", "t[:, None] - on[None, :] >= window)", "t[:, None] - on[None, :] >= 0)", "banded"),
    Mutant("sinks enter the state", "band.py", "here & (oldest >= skip)", "here & (oldest >= 0)", "window_linear"),
    Mutant("empty branch sets the maximum", "band.py", "tl.where(den > 0, b_mix * LOG2E, float(\"-inf\"))", "b_mix * LOG2E", "window_linear"),
    Mutant("state's mass not faded", "band.py", "                mass *= fade\n", "                mass *= 1.0\n", "window_linear and scalar"),
    Mutant("running sums not rescaled", "pieces.py", "sums * keep[:, None]", "sums", "banded"),
    Mutant("slopes without the row's correction", "band.py", "input_precision=PRECISION) + b_e[:, None])", "input_precision=PRECISION))", "banded"),
    Mutant("key gradients without scale", "band.py", "exists, ok < K, b_dk * scale)", "exists, ok < K, b_dk)", "banded"),
    Mutant("sink gradients from one segment only", "band.py", "slot = start // (SEG * BT) + i_n + i_s", "slot = start // (SEG * BT)", "banded and packed"),
    Mutant("segment starts from the wrong state", "band.py", "hs += ((start // (SEG * BT) + i_n + i_s)", "hs += ((start // (SEG * BT) + i_n)", "segments"),
    Mutant("step reads before it writes", "steps.py", "    s += b_k[:, None] * b_v[None, :]\n", "    s += 0 * b_k[:, None] * b_v[None, :]\n", "steps"),
    Mutant("window step forgets who left", "steps.py", "            mass += b_f\n", "            mass += 0 * b_f\n", "window_step"),
]  # fmt: skip


def mutate(folder: Path, mutant: Mutant) -> None:
    path = folder / mutant.file
    parts = path.read_text(encoding="utf-8").split(mutant.old)
    if len(parts) < mutant.nth + 2:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} is not in {mutant.file}; bring the list up to date.")
    path.write_text(mutant.old.join(parts[: mutant.nth + 1]) + mutant.new + mutant.old.join(parts[mutant.nth + 1 :]), encoding="utf-8")


def noticed(mutant: Mutant, quick: bool) -> bool:
    """True when a test fails on the mutant: the tests where it should show, then (not `quick`) all of them. In a fork, so that nothing is left behind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "triton"
        shutil.copytree(ROOT / KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        mutate(folder, mutant)
        child = os.fork()
        if child == 0:
            os._exit(0 if survives(folder, mutant, quick) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def survives(folder: Path, mutant: Mutant, quick: bool) -> bool:
    """Run the interpreter tests on the kernels in `folder`."""
    kernels = types.ModuleType("subquad.kernels.triton")
    kernels.__path__ = [str(folder)]
    sys.modules["subquad.kernels.triton"] = kernels
    base = ["-x", "-q", "-p", "no:cacheprovider", f"--confcutdir={ROOT / TESTS}", str(ROOT / TESTS / "test_kernels.py")]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    return all(pytest.main(base + chosen) in (0, 5) for chosen in ([["-k", mutant.tests]] if quick else [["-k", mutant.tests], []]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--quick", action="store_true", help="only the tests where each bug should show")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    chosen = [m for m in MUTANTS if asked.only is None or m.name in asked.only.split(",")]
    result = {}
    for mutant in chosen:
        result[mutant.name] = noticed(mutant, asked.quick)
        print(f"{'noticed' if result[mutant.name] else 'MISSED ':8} {mutant.name}", flush=True)
    caught = sum(result.values())
    print(f"{caught} of {len(result)} noticed ({100 * caught / max(len(result), 1):.0f} %)")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(caught < 0.95 * len(result))


if __name__ == "__main__":
    main()
