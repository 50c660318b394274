"""Every tolerance of the suite, with its reason. None is widened to make a test pass (DESIGN section 11)."""

from torch import Tensor

# fp32 arithmetic has a relative step of 6e-8; a few layers of sums in another order lose one to two digits of it.
FAMILY = 1e-5  # logits of tiny models with three layers, relative to the largest logit (the project's bar)
MIXER = 1e-4  # one mixer against its O(T^2) definition: sums over hundreds of tokens and quotients of such sums
MIXER_GRADIENT = 1e-3  # its gradients: differences of such quotients; measured 1e-6 to 1e-4
EXACT_START = 1e-5  # a mixer in its exact setting against the teacher's attention (the project's bar)
BF16 = 1e-2  # outputs of a mixer in bf16 (8 bits: steps of 4e-3), its sums in fp32, relative to the largest output
OP = 2e-5  # an op in fp32 against its definition in fp64, relative to the largest number of the result; measured 1e-7 to 3e-6
OP_GRADIENT = 1e-4  # its gradients: products of two such sums; measured 1e-7 to 1e-5
SAME_NUMBERS = 0.0  # the same kernels on the same numbers: restore, as_teacher, reload of fp32 weights
FOLDER = 1e-4  # logits of a folder loaded in another process (the project's bar)
BYTES = 0.05  # planned bytes over measured bytes (the project's bar)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number wanted (never below 1e-3, so that all-zero results compare). NaN counts as infinite."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    found, wanted = found.double(), wanted.double()
    difference = (found - wanted).abs().max().item() if found.numel() else 0.0
    return difference / max(wanted.abs().max().item() if wanted.numel() else 0.0, 1e-3) if difference == difference else float("inf")


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    off = error(found, wanted)
    assert off <= tolerance, f"{what}: off by {off:.2e}, allowed {tolerance:.0e}"
