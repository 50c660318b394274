"""Cold start: kernels compiled by the first call of an op, and seconds until their binaries are there, from an empty cache directory. No GPU: compiled ahead
of time for one that is not here, with exactly the launches of the call.

    python benchmarks/kernels_cold_start.py [--target sm_90] [--ops additive-none,..] [--json FILE]

bf16, D = 64, 64 sequences of 512 tokens, 2 heads, initial and final state (window 64). Every call in a process of its own. Ours compile one configuration a kernel.
fla-core's ops, where installed, go through their own autotuners: the configurations they consider are compiled, as on a GPU, where each is then timed as well.
Seconds are of the processor (this process and the compilers it starts), imports not included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parents[1]
D = 64
OURS = "subquad"
COLUMNS = ["op", "call", "kernels", "forward", "forward s", "both", "both s"]  # configurations compiled; both: with the backward pass


def calls(op: str) -> list[str]:
    import fla_peer

    return [OURS, *(fla_peer.OPS[op] if fla_peer.present() else ())]


def outputs(op: str, name: str) -> list:
    """Forward of our op, or of fla's op called `name`, in the shapes of tests/aot/cases.py."""
    import cases

    if name == OURS:
        function, arguments = cases.CASES[f"{op}-{D}"]
        return function(*arguments)
    import fla_peer

    q, k, v = cases.qkv(D)
    fq, fk = cases.qkv(D)[:2]
    x = SimpleNamespace(q=q, k=k, v=v, fq=fq, fk=fk, gate=cases.gate(op.rpartition("-")[2], D), beta=cases.gate("scalar", D))
    state = cases.tensor(cases.B, cases.H, D, D, dtype=cases.torch.float32)
    return fla_peer.call(name, x, initial_state=state, output_final_state=True)


def measure(op: str, name: str, target: str) -> dict:
    """Compiled configurations of all kernels and processor seconds, after the forward pass and after both."""
    sys.path.insert(0, str(HERE / "tests"))
    import light_package

    light_package.install(HERE / "tests/aot")
    import compiler
    import fla_peer

    gpu = fla_peer.as_on(target)
    import cases

    if name != OURS:
        import fla.ops  # noqa: F401 - before the clock
    row = {"op": op, "call": name}
    with compiler.compiling(target, gpu=gpu, read=False) as found:
        began = compiler.cpu_seconds()

        def note(passes: str) -> None:
            row[passes] = len({id(one) for one in found}) + gpu.failed
            row[f"{passes} s"] = round(compiler.cpu_seconds() - began, 1)

        outs = outputs(op, name)
        note("forward")
        cases.backward(outs)
        note("both")
    return row | {"kernels": len({one.kernel for one in found}), "failed": gpu.failed}


def apart(op: str, name: str, target: str) -> dict:
    """`measure` in a new process with an empty cache directory."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--target", target, "--one", op, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{op}, {name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import fla_peer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--ops", default="additive-none,additive-scalar,additive-vector,delta-none,delta-scalar,window_linear-none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("OP", "CALL"), help="this call alone, in this process and cache directory")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one, asked.target)))
        return
    if not fla_peer.present():
        print("fla-core is not installed: subquad alone", file=sys.stderr)
    rows = []
    print(*("| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS))), sep="\n")
    for op in asked.ops.split(","):
        for name in calls(op):
            rows.append(apart(op, name, asked.target))
            print("| " + " | ".join(str(rows[-1][column]) for column in COLUMNS) + " |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
