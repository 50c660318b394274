"""Two-layer models trained from scratch on associative recall, one mixer each: softmax solves it, the delta rule remembers more than plain linear
attention whose state is as large (17,664 and 17,920 bytes), and a window alone guesses.

    python benchmarks/mqar_from_scratch.py [seed]        # under ten minutes on two free CPU cores

16 pairs out of 16 keys and 16 values, all asked, at least 16 tokens after the last pair; windows of 8 tokens reach 14 back through two layers.
"""

import sys
import time

from rich.console import Console

from subquad.evals import table
from subquad.evals.rows import arrange
from subquad.progress import Reporter
from subquad.scratch import Budget, train_mixer

TASK = {"pairs": 16, "queries": 16, "gap": 16, "letters": 32}
STEPS = 1200  # at the most; softmax needs 370, the delta rule 479 (seed 0)
MIXERS = ("softmax", "gated_delta", "linear", "window")


def main(seed: int = 0) -> None:
    started, report, rows = time.monotonic(), Reporter(), []
    for name in MIXERS:
        rows += train_mixer(name, "mqar", settings=TASK, budget=Budget(seed=seed, steps=STEPS), report=report)
    table.render(arrange(rows, list(MIXERS)), Console(width=160))
    for row in rows:
        if "beyond" in row["setting"]:
            print(
                f"{row['model']:14} {row['value']:7.2%} ± {row['stderr']:.2%} (chance {row['chance']:.2%}), {row['state_bytes']:,} bytes, {row['steps']} steps"
            )
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]))
