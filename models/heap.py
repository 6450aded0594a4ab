"""The heap on a CPU: what glibc's keeps of freed blocks, too little before it has seen that they come again, then much.

It asks the system for blocks above a threshold, gives them back when they are freed, and raises the threshold to the
largest that was, 32 MiB at the most (mallopt(3), M_MMAP_THRESHOLD). A network whose maps grow from layer to layer so
pays for new pages, which the system has to clear, at each size anew. A block that is freed unwritten costs nothing and
teaches the same at once: of a first guided step after loading, 512x512, two cores, 2.28 to 1.95 s in bfloat16, 5.56 to
5.32 in float32.

What it has kept then lies beside the maps that come after it, if these are larger than the threshold. It is given back
where a decoder's maps become large: 512x512 in bfloat16 took 0.24 to 0.32 GiB over its weights, and 0.16 to 0.18 with
it; of 5.7 s the giving back takes 0.02, and nothing more was seen of it. Other heaps take no notice of either.
"""

import ctypes
import sys

import torch

LARGEST = 2**25 - 2**16     # bytes: with what glibc adds, still no more than it learns from


def expect_large_blocks() -> None:
    """Teach the heap what the first large maps of a network would."""
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")


def give_back() -> None:
    """Return to the system the pages of what was freed: malloc_trim(3)."""
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
