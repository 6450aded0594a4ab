"""A 3x3 convolution of a map that nearest-neighbour doubling made larger, without making the larger map.

Each position of the small map gives a product to each of the nine places of the kernel; a pixel of the large map sums
nine of them, and its neighbours the same ones: 9 products a small pixel instead of 36. Along one axis the sum is

    y[2n]     = a[n-1] + m[n] + c[n]
    y[2n + 1] = a[n]   + m[n] + c[n+1],

of the kernel's first, middle and last place; the other axis sums these. Measured on one core in float32, 640 channels
of 32x32: 190 to 90 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.layout import empty

LARGER = 64                 # for smaller maps, putting the weight in order costs more than it saves
BAND_BYTES = 16 * 2**20     # of products at a time


def is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution of twice(x) is better made here. x: (B, C, h, w), weight: (C_out, C, 3, 3).

    Not in bfloat16: the sums take as long as what they save, and round two and a half times as much.
    """
    return x.device.type == "cpu" and x.dtype != torch.bfloat16 and LARGER * x.numel() > weight.numel()


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(twice(x)), of frozen weights. x: (B, C, h, w), weight: (C_out, C, 3, 3). Returns (B, C_out, 2h, 2w)."""
    return _DoubledConv.apply(x, weight, bias)


class _DoubledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        height, width = x.shape[2:]
        y = empty(x, len(weight), 2 * height, 2 * width)
        taps = _taps(weight)
        for pixels, out in zip(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)):                  # (h, w, C), (2h, 2w, O)
            for first, last in _bands(height, width * taps[:, 0].nbytes):
                above, below = first > 0, last < height                                        # rows seen beyond it
                products = F.linear(pixels[first - above : last + below], taps)                # (rows, w, 9 O)
                rows = _summed(products.unflatten(2, (3, -1)), 0)[2 * above : 2 * (last - first + above)]
                out[2 * first : 2 * last] = _summed(rows.unflatten(2, (3, -1)), 1).add_(bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        height, width = dy.shape[2] // 2, dy.shape[3] // 2
        dx = empty(dy, weight.shape[1], height, width)
        taps = _taps(weight)
        for pixels, out in zip(dy.permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1)):
            for first, last in _bands(height, width * taps[:, 0].nbytes):
                above, below = first > 0, last < height
                columns = _spread(pixels[2 * (first - above) : 2 * (last + below)], 1).flatten(2)
                products = _spread(columns, 0)[above : above + last - first].flatten(2)        # (rows, w, 9 O)
                out[first:last] = products @ taps
        return dx, None, None


def _taps(weight: Tensor) -> Tensor:
    """(C_out, C, 3, 3) -> (3 * 3 * C_out, C)."""
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])


def _summed(places: Tensor, dim: int) -> Tensor:
    """(h, w, 3, K), the products of a kernel's three places along dim -> the sums, twice as many there, (…, K)."""
    a, m, c = places.unbind(2)
    n = a.shape[dim] - 1
    sums = a.new_empty(*a.shape[: dim + 1], 2, *a.shape[dim + 1 :])
    even, odd = sums.unbind(dim + 1)
    torch.add(m, c, out=even).narrow(dim, 1, n).add_(a.narrow(dim, 0, n))
    torch.add(a, m, out=odd).narrow(dim, 0, n).add_(c.narrow(dim, 1, n))
    return sums.flatten(dim, dim + 1)


def _spread(sums: Tensor, dim: int) -> Tensor:
    """The transposed of `_summed`: (…, K) -> (h, w, 3, K)."""
    even, odd = sums.unflatten(dim, (-1, 2)).unbind(dim + 1)
    n = even.shape[dim] - 1
    places = even.new_empty(*even.shape[:2], 3, even.shape[2])
    a, m, c = places.unbind(2)
    torch.add(even, odd, out=m)
    a.copy_(odd).narrow(dim, 0, n).add_(even.narrow(dim, 1, n))
    c.copy_(even).narrow(dim, 1, n).add_(odd.narrow(dim, 0, n))
    return places


def _bands(height: int, row_bytes: int) -> list[tuple[int, int]]:
    """The first row and the one after the last of each band, whose products take at most BAND_BYTES."""
    rows = max(1, BAND_BYTES // row_bytes)
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]
