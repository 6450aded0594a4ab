"""Attention over slices of query rows against torch's fused kernel, at the shapes of Stable Diffusion 1.5 and GLIDE.

    python benchmarks/attention.py [--json FILE]

This is the measurement that decides `models.attend.best_kind`: ours is the sliced one, the peer the fused one. One
image, and of the guided batch the largest attention. "training" is forward and backward, with the gradients of all
three inputs; "mixed" is that with torch's kernel forward and slices backward, of use in bfloat16.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _measure import command, compare
from _process import Side, Step, Work
from torch import Tensor

from models.sliced_attention import sliced_attention


class Shape(NamedTuple):
    """Queries (B, heads, rows, width), keys and values (B, heads, columns, width), of an image of so many pixels."""

    batch: int
    heads: int
    rows: int
    columns: int
    width: int
    resolution: int
    causal: bool = False


SHAPES = {
    "self, 64x64": Shape(1, 8, 4096, 4096, 40, 512),
    "self, 64x64, guided": Shape(2, 8, 4096, 4096, 40, 512),
    "self, 32x32": Shape(1, 8, 1024, 1024, 80, 512),
    "self, 16x16": Shape(1, 8, 256, 256, 160, 512),
    "cross, 64x64": Shape(1, 8, 4096, 77, 40, 512),
    "VAE, 64x64": Shape(1, 1, 4096, 4096, 512, 512),
    "text": Shape(1, 12, 77, 77, 64, 512, causal=True),
    "GLIDE, 32x32": Shape(1, 6, 1024, 1152, 64, 64),
}
WORKS = [
    Work(f"{direction}: {name}", dtype, shape.resolution)
    for dtype in ("float32", "bfloat16")
    for direction in ("forward", "training", "mixed")[: 2 + (dtype == "bfloat16")]
    for name, shape in SHAPES.items()
]


def inputs(built: None, work: Work) -> tuple[str, Shape, list[Tensor], Tensor]:
    """The direction, the shape, q, k, v, and the gradient of the output."""
    direction, name = work.work.split(": ")
    shape, generator = SHAPES[name], torch.Generator().manual_seed(0)
    sizes = [(shape.batch, n, shape.heads, shape.width) for n in (shape.rows, shape.columns, shape.columns, shape.rows)]
    drawn = [torch.randn(size, generator=generator).to(getattr(torch, work.dtype)) for size in sizes]
    q, k, v, d_out = (x.transpose(1, 2) for x in drawn)     # the heads of a token lie side by side, as in the networks
    return direction, shape, [x.requires_grad_(direction != "forward") for x in (q, k, v)], d_out


def start_ours(built: None, work: Work) -> Step:
    """Slices, as large as they are by default."""
    direction, shape, qkv, d_out = inputs(built, work)
    forward = lambda: sliced_attention(*qkv, shape.causal, fused_forward=direction == "mixed")  # noqa: E731
    return forward if direction == "forward" else lambda: torch.autograd.grad(forward(), qkv, d_out)


def start_peer(built: None, work: Work) -> Step:
    """torch's choice, which on a CPU is the fused kernel."""
    direction, shape, qkv, d_out = inputs(built, work)
    forward = lambda: F.scaled_dot_product_attention(*qkv, is_causal=shape.causal)  # noqa: E731
    return forward if direction == "forward" else lambda: torch.autograd.grad(forward(), qkv, d_out)


def nothing(work: Work) -> None:
    """There are no networks to build."""


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS, all in one pair of processes."""
    yield from compare(WORKS, Side(nothing, start_ours), Side(nothing, start_peer))


if __name__ == "__main__":
    command(__doc__, measure)
