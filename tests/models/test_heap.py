"""What loading teaches the heap. In a process of its own: this one's heap has seen large blocks before."""

import platform
import subprocess
import sys

import pytest

import models

BYTES = 20 * 2**20
PROGRAM = f"""
import resource, torch
from models.heap import expect_large_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros({BYTES}, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
torch.zeros(8, dtype=torch.uint8).add_(1)
if TAUGHT:
    expect_large_blocks()
print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
def test_a_heap_that_was_taught_keeps_a_large_block_for_the_next() -> None:
    pages = BYTES // 4096
    for taught in (False, True):
        program = PROGRAM.replace("TAUGHT", str(taught))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        _, second = map(int, done.stdout.split())
        # untaught, the second block is the first that comes from the heap: it is new, too. A tenth: other allocations
        assert (second < 0.1 * pages) == taught


def test_loading_teaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("models.loading.expect_large_blocks", lambda: calls.append(None))
    models.load("emoji", device="cpu")
    assert len(calls) == 1
