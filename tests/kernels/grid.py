"""The grid of shapes and numbers that every op is compared on, with its definition in fp64: all of it by benchmarks/kernels_grid.py, some by test_grid.py.

A row per op, kind of gate (and of keys), length and head size; query heads per key/value head, value size, packing and initial state are dealt out. In
`pairs`, a quarter of the rows, every two values of two columns still meet (tests/kernels/test_grid.py); all products would be 24 times the grid.

Key: as in subquad/kernels/ops.py; D head size (K = D; V = D or the other), R query heads per key/value head.
"""

import itertools
from dataclasses import dataclass

import torch
from kernels.test_ops import D64, decay, randn
from torch.nn.functional import normalize

from subquad.kernels.features import FUSED

LENGTHS, SIZES, GROUPS = (1, 31, 64, 77, 250, 1000), (32, 64, 80, 128), (1, 3, 8)
OTHER = {32: 64, 64: 80, 80: 48, 128: 32}  # V where K != V
SCALAR = ("none", "scalar", "scalar strong", "scalar mixed")
VECTOR = ("vector", "vector strong", "vector mixed")
MAPPED = ("mapped", "mapped vector")  # a feature map inside, with a scalar or a vector decay; which map, the head size says
MAPS = dict(zip(SIZES, FUSED, strict=True))
KINDS = {
    "additive": SCALAR + VECTOR,
    "delta": (*SCALAR, "repeated"),  # repeated: three keys again and again, beta 1 - 1e-4, mixed gates
    "banded": ("inside", "given"),  # where the sinks are; given: a continued call
    "window_linear": SCALAR + VECTOR,
    "mapped additive": MAPPED,
    "mapped window_linear": MAPPED,
}  # the last word of a name is the op; every name is dealt out for itself
STEPS = {
    "additive_step": ("none", "scalar", "vector"),
    "delta_step": ("none", "scalar"),
    "window_linear_step": ("none", "scalar", "vector"),
}
SINKS = 4
REST = list(itertools.product(GROUPS, (False, True), (False, True), (False, True)))  # R, packed, initial state, K != V


@dataclass(frozen=True)
class Row:
    op: str
    kind: str
    T: int
    D: int
    R: int
    V: int
    packed: bool
    state: bool

    def __str__(self) -> str:
        more = [name for name in ("packed", "state") if getattr(self, name)]
        return ", ".join([self.op, self.kind, f"T {self.T}", f"K {self.D}", f"V {self.V}", f"R {self.R}", *more])


def columns(row: Row) -> list[tuple]:
    """Every pair of values of two columns that the row has."""
    values = list(vars(row).items())[1:]
    values = [("other" if name == "V" else name, value != row.D if name == "V" else value) for name, value in values]
    return list(itertools.combinations(values, 2))


def pairs() -> list[Row]:
    """Fewest rows: of every op, each kind of gate at each length and each of two columns' values together at least once."""
    rows = []
    for name, kinds in KINDS.items():
        seen: set = set()
        op = name.split()[-1]
        for (i, T), (j, kind) in itertools.product(enumerate(LENGTHS), enumerate(kinds)):
            for D in SIZES if len(kinds) == 2 else (SIZES[(i + j) % len(SIZES)],):  # with few kinds there would be too few rows
                choices = [dealt(op, kind, T, D, *rest) for rest in REST]
                best = max(choices, key=lambda row: len(set(columns(row)) - seen))
                seen |= set(columns(best))
                rows.append(best)
    return rows


def grid() -> list[Row]:
    """Every op, kind, length and size: the rows of `pairs` first, then the others."""
    first = pairs()
    taken = {(row.op, row.kind, row.T, row.D) for row in first}
    plain = [name for name in KINDS if " " not in name]
    mapped = [name for name in KINDS if " " in name]
    places = [(name.split()[-1], kind, T, D) for names in (plain, mapped) for T in LENGTHS for name in names for kind in KINDS[name] for D in SIZES]
    return first + [dealt(*place, *REST[7 * n % len(REST)]) for n, place in enumerate(places) if place not in taken]


def dealt(op: str, kind: str, T: int, D: int, R: int, packed: bool, state: bool, other: bool) -> Row:
    return Row(op, kind, T, D, R, OTHER[D] if other else D, packed and kind != "given", state and op != "banded")


def tensors(row: Row) -> tuple[dict, dict]:
    """(tensors with gradients, other arguments) of a row's op, in fp64."""
    torch.manual_seed(row.T + row.D + row.R)
    B, G = 1 if row.packed or row.T > 100 else 2, 2 if row.R == 1 else 1
    N = 4 if row.packed else B
    cu = torch.tensor([0, 1, 1, max(1, row.T // 2), row.T]) if row.packed else None
    mapped = {"feature_map": MAPS[row.D]} if row.kind in MAPPED else {}
    if row.op in ("additive", "delta"):
        return linear(row, B, G, N), {"scale": 0.3, "output_final_state": True, "cu_seqlens": cu} | mapped
    leaves, other = windowed(row, B, G, N, cu)
    return leaves, other | mapped


def gate(kind: str, B: int, T: int, G: int, F: int):
    return decay({"mapped": "scalar", "mapped vector": "vector"}.get(kind, kind), B, T, G, F)


def features(row: Row, numbers: int) -> int:
    """Of a head with as many numbers before the map, if there is one."""
    return numbers * (FUSED[MAPS[row.D]].signs if row.kind in MAPPED else 1)


def linear(row: Row, B: int, G: int, N: int) -> dict:
    T, K, V = row.T, row.D, row.V
    k, F = randn(B, T, G, K), features(row, row.D)
    leaves = {"q_BTHK": randn(B, T, G * row.R, K), "k_BTGK": k, "v_BTGV": randn(B, T, G, V)}
    leaves["initial_state"] = randn(N, G, F, V) if row.state else None
    if row.op == "additive":
        return leaves | {"log_decay": gate(row.kind, B, T, G, F)}
    k, beta = normalize(k, dim=-1), torch.rand(B, T, G, dtype=D64)
    if row.kind == "repeated":
        k, beta = k[:, torch.arange(T) % min(3, T)], torch.full_like(beta, 1 - 1e-4)
    gates = decay("scalar mixed" if row.kind == "repeated" else row.kind, B, T, G, K)
    return leaves | {"k_BTGK": k, "beta_BTG": beta, "log_decay_BTG": gates}


def windowed(row: Row, B: int, G: int, N: int, cu) -> tuple[dict, dict]:
    """A window of 16 or 64 tokens and 4 sinks. Features as wide as keys, except with a decay each over 1,000 tokens, where the definition needs T^2 F numbers."""
    T, K, V, R = row.T, row.D, row.V, row.R
    window = 16 if T <= 100 else 64
    before = window if row.kind == "given" else 0
    other = {"window": window, "sinks": SINKS, "position": before + 30 if before else 0, "cu_seqlens": cu}
    leaves = {"q_BTHK": randn(B, T, G * R, K), "k_BXGK": randn(B, T + before, G, K), "v_BXGV": randn(B, T + before, G, V)}
    if before:
        leaves |= {"sink_k_BNGK": randn(B, SINKS, G, K), "sink_v_BNGV": randn(B, SINKS, G, V)}
    if row.op == "banded":
        return leaves, other
    Y = 32 if T > 500 and "vector" in row.kind else row.D
    leaves |= {
        "fq_BTHF": torch.rand(B, T, G * R, Y, dtype=D64),
        "fk_BXGF": torch.rand(B, T, G, Y, dtype=D64),
        "mix_BTH": randn(B, T, G * R),
    }
    F = features(row, Y)
    leaves |= {"log_decay": gate(row.kind, B, T, G, F), "initial_state": torch.rand(N, G, F, V + 1, dtype=D64) if row.state else None}
    return leaves, other | {"output_final_state": True}


@dataclass(frozen=True)
class Step:
    op: str
    kind: str
    D: int
    R: int
    V: int

    def __str__(self) -> str:
        return f"{self.op}, {self.kind}, K {self.D}, V {self.V}, R {self.R}"


def steps() -> list[Step]:
    places = [(op, *place) for op, kinds in STEPS.items() for place in itertools.product(kinds, SIZES, GROUPS)]
    return [Step(op, kind, D, R, OTHER[D] if n % 2 else D) for n, (op, kind, D, R) in enumerate(places)]


def step(row: Step, dtype: torch.dtype) -> dict:
    """Arguments of a row's step in `dtype`, by name."""
    torch.manual_seed(row.D + row.R)
    B, G, W, D, R, V = 2, 2, 40, row.D, row.R, row.V
    g = decay(row.kind, B, 1, G, D)
    gate = None if g is None else g[:, 0]
    if row.op == "window_linear_step":
        given = {
            "q_BHK": randn(B, G * R, D), "k_BWGK": randn(B, W, G, D), "v_BWGV": randn(B, W, G, V), "fq_BHF": torch.rand(B, G * R, D, dtype=D64),
            "mix_BH": randn(B, G * R), "state_BGFX": torch.rand(B, G, D, V + 1, dtype=D64), "left_fk_BGF": torch.rand(B, G, D, dtype=D64),
            "left_v_BGV": randn(B, G, V), "log_decay": gate,
            "sink_k_BNGK": randn(B, SINKS, G, D), "sink_v_BNGV": randn(B, SINKS, G, V),
        }  # fmt: skip
    else:
        given = {"q_BHK": randn(B, G * R, D), "k_BGK": normalize(randn(B, G, D), dim=-1), "v_BGV": randn(B, G, V), "state_BGKV": randn(B, G, D, V)}
        given |= {"beta_BG": torch.rand(B, G, dtype=D64), "log_decay_BG": gate} if row.op == "delta_step" else {"log_decay": gate}
    return {name: x if x is None else x.to(dtype) for name, x in given.items()} | ({} if row.op == "window_linear_step" else {"scale": 0.3})
