"""Triton's interpreter, corrected and watched. Import before any module that defines kernels; sets TRITON_INTERPRET.

What the stock interpreter (3.9) gets wrong without saying so, and what is done here instead:

* bf16 is kept as its bit pattern and computed on as an integer -> kept as fp32 values, rounded to nearest even after every operation;
* fp32 -> bf16 truncates -> rounds to nearest even;
* tl.dot ignores input_precision -> tf32, tf32x3, bf16x3, bf16x6 round or split their operands as the hardware does;
* bounds and races are not looked at -> `watch()` checks every address against the tensors of the launch, and who else wrote it;
* nothing is counted -> `watch()` counts bytes, 32-byte sectors, matmul operations and launches.

The interpreter and the compiler cannot live in one process: triton binds its standard library to one of them on import.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import collections
import contextlib

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

BF16 = tl.bfloat16
Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle
PRECISION = ir.INPUT_PRECISION
SECTOR = 32  # bytes a GPU's L2 moves at least


# ---- numbers -----------------------------------------------------------------------------------------------------------------------


def round_bits(x: np.ndarray, dropped: int) -> np.ndarray:
    """fp32 rounded to nearest even after dropping the lowest `dropped` mantissa bits; inf and nan stay."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    odd = (bits >> np.uint32(dropped)) & np.uint32(1)
    rounded = ((bits + half + odd) >> np.uint32(dropped)) << np.uint32(dropped)
    return np.where(np.isfinite(x), rounded.view(np.float32), x).astype(np.float32).reshape(np.shape(x))


def to_bf16(x: np.ndarray) -> np.ndarray:
    return round_bits(x, 16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    return round_bits(x, 13)


def _is_bf16(*handles) -> bool:
    return any(handle.dtype.scalar == BF16 for handle in handles)


def _pattern(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).reshape(np.shape(x))


def _value(pattern: np.ndarray) -> np.ndarray:
    return (pattern.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _parts(x: np.ndarray, rounding, count: int) -> list[np.ndarray]:
    found = []
    for _ in range(count):
        found.append(rounding(x))
        x = (x - found[-1]).astype(np.float32)
    return found


def multiply(a: np.ndarray, b: np.ndarray, precision) -> np.ndarray:
    """fp32 a @ b as a tensor core computes it in `precision` (products of rounded parts, summed in fp32)."""
    schemes = {
        PRECISION.TF32: (to_tf32, 1),
        PRECISION.TF32x3: (to_tf32, 2),
        PRECISION.BF16x3: (to_bf16, 2),
        PRECISION.BF16x6: (to_bf16, 3),
    }
    if precision not in schemes:
        return np.matmul(a, b)
    rounding, count = schemes[precision]
    left, right = _parts(a, rounding, count), _parts(b, rounding, count)
    terms = [(i, j) for i in range(count) for j in range(count) if i + j < count]
    return sum(np.matmul(left[i], right[j]) for i, j in sorted(terms, key=sum, reverse=True))


# ---- the builder ---------------------------------------------------------------------------------------------------------------------

_numpy_type, _fits = stock._get_np_dtype, stock._validate_np_data_size
_cast, _convert, _binary, _unary, _ternary, _fabs = (
    Builder.cast_impl,
    Builder.create_fp_to_fp,
    Builder.binary_op,
    Builder.unary_op,
    Builder.ternary_op,
    Builder.create_fabs,
)
_load, _store = Builder.create_masked_load, Builder.create_masked_store


_types: dict[str, np.dtype] = {"bf16": np.dtype(np.float32)}  # by name: the stock look-up builds its table anew every time


def numpy_type(dtype):
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if isinstance(element, tl.pointer_type):
        return np.dtype(np.uint64)
    if element.name not in _types:
        _types[element.name] = _numpy_type(element)
    return _types[element.name]


def _settle(handle: Handle) -> Handle:
    """A result labelled bf16 takes bf16 values."""
    if _is_bf16(handle) and handle.data.dtype != np.bool_:
        handle.data = to_bf16(handle.data)
    return handle


def cast(self, source, wanted):
    if not (_is_bf16(source) or wanted.scalar == BF16):
        return _cast(self, source, wanted)
    data = source.data.astype(np.float32)
    return Handle(to_bf16(data) if wanted.scalar == BF16 else data.astype(numpy_type(wanted.scalar)), wanted.scalar)


def convert(self, source, wanted, rounding):
    if _is_bf16(source) or wanted.scalar == BF16:
        return cast(self, source, wanted)
    return _convert(self, source, wanted, rounding)


def dot(self, a, b, accumulator, precision, _imprecise):
    x, y = a.data, b.data
    watcher.matmul(x.shape, y.shape)
    if x.dtype == np.float16:  # numpy has no fast half matmul; products of halves are exact in fp32
        x, y = x.astype(np.float32), y.astype(np.float32)
    exact = a.dtype.scalar != tl.float32
    product = np.matmul(x, y) if exact else multiply(x, y, precision)
    return Handle((product + accumulator.data).astype(accumulator.data.dtype), accumulator.dtype.scalar)


def load(self, pointers, mask, other, cache, volatile):
    kind = pointers.get_element_ty()
    watcher.access(pointers.data, mask.data, max(1, kind.primitive_bitwidth // 8), write=False)
    if kind != BF16:
        return _load(self, pointers, mask, other, cache, volatile)
    fill = np.zeros(pointers.data.shape, np.uint16) if other is None else _pattern(np.broadcast_to(other.data, pointers.data.shape))
    return Handle(_value(stock._interpreter.load(pointers.data, mask.data, fill, np.dtype(np.uint16))), BF16)


def store(self, pointers, value, mask, cache):
    kind = pointers.get_element_ty()
    watcher.access(pointers.data, mask.data, max(1, kind.primitive_bitwidth // 8), write=True)
    if kind != BF16:
        return _store(self, pointers, value, mask, cache)
    return stock._interpreter.store(pointers.data, _pattern(value.data), mask.data)


def fabs(self, x):
    return Handle(np.abs(x.data), x.dtype.scalar) if _is_bf16(x) else _fabs(self, x)


def exponentials(self, x, operation):
    watcher.exponentials += x.data.size if operation in (np.exp, np.exp2, np.log, np.log2) else 0
    return _settle(_unary(self, x, operation))


_patched: set[str] = set()  # modules whose view of the language this launch has patched


def device_function(self, *args, **kwargs):
    """A kernel's call of another jit function. The stock interpreter patches the language at every call, a third of its time; once a launch and module will do."""
    if self.fn.__module__ not in _patched:
        stock._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    stock._get_np_dtype = numpy_type
    stock._validate_np_data_size = lambda data, dtype: dtype.scalar == BF16 or _fits(data, dtype)
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = cast, convert, dot
    Builder.create_masked_load, Builder.create_masked_store, Builder.create_fabs = load, store, fabs
    Builder.binary_op = lambda self, a, b, operation: _settle(_binary(self, a, b, operation))
    Builder.ternary_op = lambda self, a, b, c, operation: _settle(_ternary(self, a, b, c, operation))
    Builder.unary_op = exponentials
    options = dict(allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"))
    stock.interpreter_builder.options = stock.InterpreterOptions(**options)
    stock.GridExecutor.__call__, stock.InterpretedFunction.__call__ = launch, device_function


# ---- watching ------------------------------------------------------------------------------------------------------------------------


class Watcher:
    """What the launches inside one `watch()` did. Off unless entered."""

    def __init__(self):
        self.on = self.check = False
        self.reset()

    def reset(self) -> None:
        self.bytes = collections.Counter()  # per argument name, "read" or "write"
        self.sectors = 0  # moved between L2 and the programs, no reuse at all
        self.fresh = 0  # moved between memory and L2 when reuse inside a launch is perfect and between launches absent
        self.flops = self.exponentials = self.programs = 0
        self.launches: list[str] = []
        self.problems: list[str] = []

    def begin(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        spans = sorted((*_span(x), name) for name, x in tensors.items() if x.numel())
        self.low, self.high = (np.array([span[i] for span in spans], dtype=np.uint64) for i in (0, 1))
        self.names = [span[2] for span in spans]
        self.kernel, self.reads, self.writes, self.seen = kernel, [], [], []
        self.launches.append(kernel)

    def matmul(self, left: tuple, right: tuple) -> None:
        if self.on:
            self.flops += 2 * int(np.prod(left)) * right[-1]

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int, write: bool) -> None:
        if not self.on:
            return
        where = pointers[np.broadcast_to(mask, pointers.shape)]
        if not where.size:
            return
        index = np.searchsorted(self.low, where, side="right").astype(np.int64) - 1
        outside = (index < 0) | (where + np.uint64(size) > self.high[np.maximum(index, 0)])
        if outside.any():
            if self.check:
                program = stock.interpreter_builder.grid_idx
                raise IndexError(
                    f"{self.kernel}: {int(outside.sum())} lanes {'write' if write else 'read'} out of bounds, program {program}"
                )
            return
        sectors = np.unique(where // np.uint64(SECTOR))
        self.bytes[self.names[index.flat[0]], "write" if write else "read"] += where.size * size
        self.sectors += sectors.size * SECTOR
        self.seen.append(sectors)
        if self.check:
            (self.writes if write else self.reads).append((where.ravel(), _program()))

    def end(self) -> None:
        if self.seen:
            self.fresh += np.unique(np.concatenate(self.seen)).size * SECTOR
        if self.check and self.writes:
            self._races()

    def _races(self) -> None:
        address, owner = _joined(self.writes)
        order = np.lexsort((owner, address))
        address, owner = address[order], owner[order]
        shared = (address[1:] == address[:-1]) & (owner[1:] != owner[:-1])
        if shared.any():
            self.problems.append(f"{self.kernel}: {int(shared.sum())} bytes or numbers written by two programs")
        if not self.reads:
            return
        read, reader = _joined(self.reads)
        at = np.minimum(np.searchsorted(address, read), address.size - 1)
        clash = (address[at] == read) & (owner[at] != reader)
        if clash.any():
            self.problems.append(f"{self.kernel}: {int(clash.sum())} numbers read by one program and written by another")


def _joined(accesses: list) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([a for a, _ in accesses]), np.concatenate([np.full(a.size, program) for a, program in accesses])


def _span(x: torch.Tensor) -> tuple[int, int]:
    if x.is_contiguous():
        return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _program() -> int:
    (x, y, z), (_, ny, nz) = stock.interpreter_builder.grid_idx, stock.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


watcher = Watcher()
_run = stock.GridExecutor.__call__


def launch(self, *args, **kwargs):
    _patched.clear()
    if not watcher.on:
        return _run(self, *args, **kwargs)
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    watcher.begin(self.fn.__name__, {name: x for name, x in given.items() if isinstance(x, torch.Tensor)})
    result = _run(self, *args, **kwargs)
    watcher.end()
    return result


@contextlib.contextmanager
def watch(check: bool = True):
    """Count what launches do; with `check`, out-of-bounds accesses raise and races are errors at the end."""
    watcher.reset()
    watcher.on, watcher.check = True, check
    try:
        yield watcher
    finally:
        watcher.on = False
    if watcher.problems:
        raise AssertionError("; ".join(watcher.problems))


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN, so that a number nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


install()
