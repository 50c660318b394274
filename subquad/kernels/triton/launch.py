"""What every launch needs: tile sizes chosen by rule (never by a benchmark at first call), default precision, shapes of packed sequences.

Key: T tokens, N sequences, K features, V columns.
"""

import os
from dataclasses import dataclass

import triton
from torch import Tensor

SEGMENT_TOKENS = 256  # tokens between two kept states when a sequence is walked by many programs
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FILL = 64  # programs below which one per head leaves most of a GPU idle
SEGMENTED_FROM = 1024  # tokens below which a second launch costs more than it gains


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one kernel for one shape."""

    BT: int
    BV: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """num_warps are groups of 32 lanes. Where a wave has 64, half as many (at least 4) hold the same tile with fewer copies of its operands."""
        return {"num_warps": min(self.num_warps, 4) if waves_of_64() else self.num_warps, "num_stages": self.num_stages}


def pad(size: int) -> int:
    """Smallest tile that holds `size`: a power of two, at least 16 (a tensor core's edge)."""
    return max(16, triton.next_power_of_2(size))


def cuda_arch() -> int:
    """Compute capability times ten of the NVIDIA GPU that launches go to; 0 for other GPUs and for the interpreter."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def waves_of_64() -> bool:
    """True on AMD's data-centre GPUs."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().warp_size == 64


def precision_of(asked: str | None) -> str:
    """input_precision of tl.dot. Only fp32 operands are affected; tf32x3 keeps fp32 accuracy on NVIDIA's tensor cores, ieee is exact everywhere."""
    if asked is not None:
        return asked
    return "tf32x3" if cuda_arch() else "ieee"


def roomy() -> bool:
    """True where matrix units take operands from shared memory (NVIDIA 9.0 to 11.x), so that registers are left for a large state."""
    return INTERPRETED or 90 <= cuda_arch() < 120


@dataclass(frozen=True)
class Packing:
    """Sequences of one call: rows of a batch, or stretches of one row between entries of `cu`."""

    T: int
    N: int
    cu: Tensor | None

    @classmethod
    def of(cls, x_BT: Tensor, cu_seqlens: Tensor | None) -> "Packing":
        B, T = x_BT.shape[:2]
        return cls(T, B if cu_seqlens is None else cu_seqlens.numel() - 1, cu_seqlens)

    @property
    def total(self) -> int:
        return self.T * self.N if self.cu is None else self.T

    def slots(self, tokens: int) -> int:
        """Places for one thing per `tokens` tokens of every sequence: sequence n, piece i is at start // tokens + n + i."""
        return self.total // tokens + self.N

    def segmented(self, programs: int) -> bool:
        """True when one program per head would leave the GPU idle and sequences are long enough to be cut."""
        return programs < FILL and self.T >= SEGMENTED_FROM
