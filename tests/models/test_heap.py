"""What loading teaches the heap. In a process of its own: this one's heap has seen large blocks before."""

import mmap
import platform
import subprocess
import sys

import pytest

import models

SIZES = [mib * 2**20 for mib in (8, 12, 16, 20, 24)]
PROGRAM = f"""
import resource, torch
from models.heap import expect_large_blocks

torch.set_num_threads(1)
torch.zeros(8, dtype=torch.uint8).add_(1)
if TAUGHT:
    expect_large_blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in {SIZES}:
    torch.zeros(size, dtype=torch.uint8).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
def test_a_heap_that_was_taught_does_not_ask_for_new_pages_at_each_size() -> None:
    """Untaught, every block is one of new pages; taught, at the least those of the largest block are new."""
    pages = sum(SIZES) / mmap.PAGESIZE
    for taught in (False, True):
        program = PROGRAM.replace("TAUGHT", str(taught))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        # the least is 0.3, half as much again where alignment lets a block not fit into the place of the one before
        assert (int(done.stdout) < 0.75 * pages) == taught


def test_loading_teaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("models.loading.expect_large_blocks", lambda: calls.append(None))
    models.load("emoji", device="cpu")
    assert len(calls) == 1
