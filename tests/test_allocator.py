"""subquad/allocator.py: what a freed tensor gives back, in processes of their own (the setting lasts as long as its process)."""

import os
import subprocess
import sys

import pytest

from subquad.allocator import OWN_PAGES, give_large_tensors_back

SCRIPT = """
import sys, torch
from subquad.allocator import give_large_tensors_back

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

done = sys.argv[1] == "fixed" and give_large_tensors_back()
torch.ones(5_000_000)  # freed: from here on glibc keeps 20 MB tensors in its heap
before = resident()
large, above = torch.ones(4_000_000), torch.ones(100_000)  # the small one holds the heap's end
del large
print(done, resident() - before)
"""


def run(how: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, env=clean)
    done, kept = ran.stdout.split()
    return done, int(kept)


glibc = pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")


@glibc
def test_a_freed_tensor_goes_back_to_the_system():
    assert run("fixed") == ("True", pytest.approx(0, abs=OWN_PAGES))
    assert run("plain")[1] > 10_000_000  # what is being avoided


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "33554432"), ("MALLOC_TRIM_THRESHOLD_", "33554432"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=33554432")],
)
def test_what_the_user_has_set_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not give_large_tensors_back()
