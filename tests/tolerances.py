"""Every tolerance of the suite, with its reason. None is widened to make a test pass (DESIGN section 11)."""

from collections.abc import Iterator

from torch import Tensor

# fp32 arithmetic has a relative step of 6e-8; a few layers of sums in another order lose one to two digits of it.
FAMILY = 1e-5  # logits of tiny models with three layers, relative to the largest logit (the project's bar)
MIXER = 1e-4  # one mixer against its O(T^2) definition: sums over hundreds of tokens and quotients of such sums
MIXER_GRADIENT = 1e-4  # its gradients (gradient_errors): differences of such quotients; measured 1e-7 to 1e-4
OWN_GRADIENT = 1e-3  # the same relative to a tensor's own largest number, however small beside the others; measured to 5e-4
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


def gradient_errors(found: dict[str, Tensor], wanted: dict[str, Tensor], least: float = 1e-2) -> Iterator[tuple[str, float]]:
    """(name, largest difference) of a call's gradients, each relative to the tensor's largest number, but at least to `least` of the call's largest.

    A gradient that cancels to less than that is a small difference of the numbers the others are made of, and has their rounding. One that is nothing but
    rounding (of q of a lone token, whose output is its value whatever q is) is judged on the scale of the others; one that is not there is zeros.
    """
    largest = max(x.abs().max().item() for x in wanted.values())
    for name in {*found, *wanted}:
        difference = (found.get(name, 0.0) - wanted.get(name, 0.0)).abs().max().item()
        own = wanted[name].abs().max().item() if name in wanted else 0.0
        scale = largest if own < 1e-6 * largest else max(own, least * largest)
        yield name, difference / scale if difference == difference else float("inf")


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    off = error(found, wanted)
    assert off <= tolerance, f"{what}: off by {off:.2e}, allowed {tolerance:.0e}"
