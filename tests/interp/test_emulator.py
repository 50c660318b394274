"""The corrected interpreter itself: it rounds as hardware does, and it sees what it should see."""

import emulator
import numpy as np
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def square(x, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    tl.store(o + i, a * a + a, mask=i < n)


@triton.jit
def multiply(x, y, o, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(o + i, tl.dot(tl.load(x + i), tl.load(y + i), input_precision=PRECISION))


@triton.jit
def collide(o, i_am):
    tl.store(o, tl.program_id(0))


def test_bf16_arithmetic_and_rounding():
    x = torch.randn(100).bfloat16()
    found = torch.empty_like(x)
    square[(4,)](x, found, 100, 32)
    assert torch.equal(found, x * x + x)
    assert np.array_equal(emulator.to_bf16(np.float32([1 + 2**-8, 1 + 3 * 2**-8, np.inf])), np.float32([1, 1 + 2**-6, np.inf]))


@pytest.mark.parametrize(
    ("precision", "low", "high"), (("ieee", 0, 5e-7), ("tf32x3", 0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16x3", 1e-7, 5e-5))
)
def test_precision_of_products(precision, low, high):
    x, y, found = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    multiply[(1,)](x, y, found, precision)
    wanted = x.double() @ y.double()
    off = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
    assert low <= off <= high


def test_reading_past_the_end_is_an_error():
    x = torch.zeros(100)
    with emulator.watch(), pytest.raises(Exception, match="out of bounds"):
        square[(4,)](x, torch.empty(100), 128, 32)


def test_two_writers_are_an_error():
    with pytest.raises(AssertionError, match="written by two programs"), emulator.watch():
        collide[(2,)](torch.empty(1, dtype=torch.int32), 0)
    emulator.watcher.reset()  # the outer watch of every test has nothing to report


def test_bytes_are_counted():
    x = torch.zeros(100)
    with emulator.watch() as seen:
        square[(4,)](x, torch.empty(100), 100, 32)
    assert seen.bytes == {("x", "read"): 400, ("o", "write"): 400} and seen.launches == ["square"]
    assert seen.sectors <= 2 * (400 + 2 * emulator.SECTOR) and seen.fresh <= seen.sectors
