"""A 3x3 convolution of a map that nearest-neighbour doubling made larger, without making the larger map.

Each position of the small map gives a product to each of the nine places of the kernel; a pixel of the large map sums
nine of them, and its neighbours the same ones: 9 products a small pixel instead of 36. Along one axis the sum is

    y[2n]     = a[n-1] + m[n] + c[n]
    y[2n + 1] = a[n]   + m[n] + c[n+1],

of the kernel's first, middle and last place; the other axis sums these. Measured in float32: 640 channels of
32x32 on one core 190 to 90 ms; two images of 1280 channels on two, 8x8: 35 to 25, 16x16: 120 to 65. In bfloat16 on two
cores of a fourth generation EPYC 38 to 19 and 138 to 49. Products of bfloat16 are rounded to it, and added in float32:
the error is √2 times that of a convolution.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models.checkpointing import dear
from models.layout import empty
from models.once import once_differentiable
from models.processor import has_amx
from models.products import product

LARGER = 256                # for smaller maps, putting the weight in order costs more than it saves
BAND_BYTES = 16 * 2**20     # of products at a time, as they are added
SOME = 3 * 2**20            # numbers of the weight that are put in order at a time


def is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution of twice(x) is better made here. x: (B, C, h, w), weight: (C_out, C, 3, 3).

    Not in bfloat16 where AMX multiplies: the sums take as long as what they save. Not compiled: torch.compile makes
    other numbers of its writes into parts of a map, or nothing at all (torch 2.14).
    """
    if torch.compiler.is_compiling() or x.dtype == torch.bfloat16 and has_amx():
        return False
    return x.device.type == "cpu" and LARGER * x.numel() > weight.numel()


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(twice(x)), of frozen weights. x: (B, C, h, w), weight: (C_out, C, 3, 3). Returns (B, C_out, 2h, 2w)."""
    return _DoubledConv.apply(x, weight, bias)


class _DoubledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return dear(weight[0].numel(), lambda: _doubled(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.saved_tensors[0].to(dy.dtype)                      # another one than dy's under autocast
        pixels = dy.permute(0, 2, 3, 1)                                                        # (B, 2h, 2w, O)
        dx = empty(dy, weight.shape[1], *(side // 2 for side in dy.shape[2:])).zero_().to(_wide(dy))
        out = dx.permute(0, 2, 3, 1)                                                           # (B, h, w, C)
        for some, taps in _some_taps(weight):
            for images, first, last in _bands(out, taps):
                above, below = first > 0, last < out.shape[1]
                seen = pixels[images, 2 * (first - above) : 2 * (last + below), :, some].to(out.dtype)
                rows = _spread(seen, 2).flatten(3)                                             # (b, 2 rows, w, 3 n)
                sums = _spread(rows, 1)[:, above : above + last - first].flatten(3)            # (b, rows, w, 9 n)
                out[images, first:last] += product(sums.to(dy.dtype), taps.T)
        return dx.to(dy.dtype), None, None


def _doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C_out, 2h, 2w), channels-last."""
    pixels = x.permute(0, 2, 3, 1).contiguous()                                                # (B, h, w, C)
    y, wide = empty(x, len(weight), *(2 * side for side in x.shape[2:])), _wide(x)
    out = y.permute(0, 2, 3, 1)                                                                # (B, 2h, 2w, O)
    for some, taps in _some_taps(weight):
        for images, first, last in _bands(pixels, taps):
            above, below = first > 0, last < pixels.shape[1]                                   # rows seen beyond it
            products = product(pixels[images, first - above : last + below], taps).to(wide)    # (b, rows, w, 9 n)
            rows = _summed(products.unflatten(3, (3, -1)), 1)[:, 2 * above : 2 * (last - first + above)]
            sums = _summed(rows.unflatten(3, (3, -1)), 2)
            out[images, 2 * first : 2 * last, :, some] = sums.add_(bias[some])
    return y


def _wide(x: Tensor) -> torch.dtype:
    """In which products are added."""
    return torch.promote_types(x.dtype, torch.float32)


def _some_taps(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(O, C, 3, 3) -> (3 * 3 * n, C) for n of the O at a time, and which they are.

    torch copies numbers nine apart five times as slowly as it multiplies them by one. (One that is not finite makes
    all nine of its kernel NaN.)
    """
    n, channels = max(1, SOME // weight[0].numel()), weight.shape[1]
    for first in range(0, len(weight), n):
        kernels = weight[first : first + n]
        if kernels.is_contiguous():
            taps = torch.eye(9, dtype=weight.dtype, device=weight.device) @ kernels.view(-1, 9).T
        else:
            taps = kernels.permute(2, 3, 0, 1)
        yield slice(first, first + n), taps.reshape(-1, channels)


def _summed(places: Tensor, dim: int) -> Tensor:
    """(…, 3, K), the products of a kernel's three places along dim -> the sums, twice as many there, (…, K)."""
    a, m, c = places.unbind(-2)
    n = a.shape[dim] - 1
    sums = a.new_empty(*a.shape[: dim + 1], 2, *a.shape[dim + 1 :])
    even, odd = sums.unbind(dim + 1)
    torch.add(m, c, out=even).narrow(dim, 1, n).add_(a.narrow(dim, 0, n))
    torch.add(a, m, out=odd).narrow(dim, 0, n).add_(c.narrow(dim, 1, n))
    return sums.flatten(dim, dim + 1)


def _spread(sums: Tensor, dim: int) -> Tensor:
    """The transposed of `_summed`: (…, K) -> (…, 3, K), half as many along dim."""
    even, odd = sums.unflatten(dim, (-1, 2)).unbind(dim + 1)
    n = even.shape[dim] - 1
    places = even.new_empty(*even.shape[:-1], 3, even.shape[-1])
    a, m, c = places.unbind(-2)
    torch.add(even, odd, out=m)
    a.copy_(odd).narrow(dim, 0, n).add_(even.narrow(dim, 1, n))
    c.copy_(even).narrow(dim, 1, n).add_(odd.narrow(dim, 0, n))
    return places


def _bands(small: Tensor, taps: Tensor) -> list[tuple[slice, int, int]]:
    """Images, the first row and the one after the last of each band of the small map (B, h, w, C), whose products with
    the taps (9 n, C) take at most BAND_BYTES, those of the rows seen beyond it aside: all images whole, or rows of one.
    """
    images, height, width, _ = small.shape
    rows = max(1, BAND_BYTES // (width * len(taps) * _wide(taps).itemsize))
    each = max(1, images) if images * height <= rows else 1
    starts = [(i, first) for i in range(0, images, each) for first in range(0, height, rows)]
    return [(slice(i, i + each), first, min(first + rows, height)) for i, first in starts]
