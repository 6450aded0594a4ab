"""What loading teaches the heap. In a process of its own: this one's heap has seen large blocks before."""

import mmap
import platform
import subprocess
import sys

import pytest
import torch

import models
from models import heap
from models.vae import VAE, VAEConfig

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


FREED = """
import mmap, torch
from models.heap import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE

blocks = [torch.zeros(60 * 1024, dtype=torch.uint8).add_(1) for _ in range(1000)]     # 60 MB, none of them a map
last = torch.zeros(60 * 1024, dtype=torch.uint8).add_(1)                              # above which nothing is trimmed
held = resident()
blocks.clear()
freed = resident()
give_back()
print(held - freed, held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="the heap of glibc")
def test_what_was_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 0.1 * 60 * 2**20            # a heap keeps it all, but for what lies at its end
    assert after > 0.9 * 60 * 2**20 * 1000 / 1024


def test_a_heap_without_trimming_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, library in (("darwin", object()), ("win32", None)):
        monkeypatch.setattr(heap.sys, "platform", system)
        monkeypatch.setattr(heap.ctypes, "CDLL", lambda name, library=library: library)
        heap.give_back()


@pytest.mark.parametrize("large", [True, False])
def test_a_decoder_gives_back_before_large_maps(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, vae = [], VAE(VAEConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2, norm_groups=2))
    monkeypatch.setattr("models.vae.is_large", lambda x: large and x.shape[2] == 8)
    monkeypatch.setattr(heap, "give_back", lambda: calls.append(None))
    vae.decode(torch.ones(1, 2, 4, 4))
    assert len(calls) == large


def test_loading_teaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("models.loading.expect_large_blocks", lambda: calls.append(None))
    models.load("emoji", device="cpu")
    assert len(calls) == 1
