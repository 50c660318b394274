"""How glibc gives memory to a process of our own (the command line, the benchmarks; never a process that only imports subquad).

By default the size from which a tensor gets pages of its own rises to 32 MiB as such tensors are freed. Below it, tensors of a whole prompt share the
heap with the few kilobytes that every layer keeps in its cache, no longer fit where the last layer's were, and the heap grows by about one of them a
layer. A fixed size ends that (numbers: docs/kernels.md, "Memory of a prefill").
"""

import ctypes
import os
import sys

OWN_PAGES = 1 << 20  # bytes from which a tensor gets pages of its own and gives them back when it is freed
KEPT = 64 << 20  # bytes of free heap that are kept for what comes next
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_* of <malloc.h>


def give_large_tensors_back() -> bool:
    """Fix the size for the rest of the process; False where there is no glibc or the user's environment says something about it."""
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys() or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, OWN_PAGES) and mallopt(TRIM_THRESHOLD, KEPT))
