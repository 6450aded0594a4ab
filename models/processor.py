"""What the processor at hand is good at. Decided by what it is, never by a stopwatch: a run repeats itself.

Measured on two cores each: of one kind of machine without, of another with AMX and Intel's own matrix products.
"""

from functools import cache
from typing import Any

import torch

LANES = 16      # numbers of float32 in a register of the widest kind; loops take what is left over one by one


@cache
def capabilities() -> dict[str, Any]:
    """What torch says of the CPU: names of instruction sets and whether it has them, and "cpu_name"."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def cpu_has_bfloat16() -> bool:
    """Whether it multiplies in bfloat16 itself (AVX512-BF16, AMX, or the same on ARM)."""
    return any(capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_amx() -> bool:
    """Whether it has AMX, on whose tiles torch's fused attention multiplies bfloat16 forward; without, and backward
    always, that multiplies in float32.

    2x8 heads, 4096 tokens, 40 channels: 0.09 s with AMX, where slices take 0.23 s; 0.26 s without, and slices 0.11 s.
    Backward, 8 heads of the same: 0.53 s on one core with AMX, where slices take 0.35.
    """
    return bool(capabilities().get("amx_tile", False))


def products_have_bfloat16() -> bool:
    """Whether oneDNN's products, with what follows them, multiply in bfloat16 itself: on x86 with either extension."""
    return has_amx() or bool(capabilities().get("avx512_bf16", False))


def matrix_products_are_fast() -> bool:
    """Whether torch's float32 products (MKL's) reach the speed of oneDNN's and of its convolutions: Intel's processors.

    There all run at 375 GFLOP/s; on AMD's the products ran at 199 and the convolutions at 376. Where there is no MKL,
    nothing was measured, and torch's products are taken.
    """
    return "AMD" not in str(capabilities().get("cpu_name", ""))
