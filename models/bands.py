"""Large maps a band of rows at a time, where no gradient is wanted: what lies between two layers never exists whole.

A norm needs the statistics of the whole map; once they are known, the rows that a convolution reads can be normed just
before it reads them. And the nearest-neighbour doubling before a convolution need not be made at all: an output row
of either parity sees two rows of the small map, so that a 3x3 kernel is four 2x2 kernels, one a parity of row and
column, whose weights are sums: 16 products a small pixel instead of 36.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models import winograd
from models.group_norm import normed, statistics
from models.layout import channels_last, empty

BAND_BYTES = 4 * 2**20
Rows = Callable[[int, int], Tensor]


def is_large(x: Tensor) -> bool:
    """Whether a map is worth it: on a CPU, from four bands on."""
    nbytes = x.numel() * x.element_size()           # torch.compile knows no x.nbytes
    return x.device.type == "cpu" and nbytes >= 4 * BAND_BYTES


def convolved(rows: Rows, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """A 3x3 convolution of the map whose rows first … last - 1 are rows(first, last), written into out (B, C, h, w).

    A band's rows are asked for before the band above it is written: out may be the map that they are made from.
    """
    height, spans = out.shape[2], list(_bands(out, weight.shape[1]))
    wanted = [(max(first - 1, 0), min(last + 1, height)) for first, last in spans]
    here = rows(*wanted[0])
    for (first, last), below in zip(spans, [*wanted[1:], None]):
        padded = F.pad(here, (0, 0, first == 0, last == height))
        here = None if below is None else rows(*below)
        if winograd.is_worth_it(padded[:, :, 1:-1], weight, (1, 1), (1, 1)):
            out[:, :, first:last] = winograd.convolved(padded, weight, bias, edges=0)
        else:
            out[:, :, first:last] = F.conv2d(padded, weight, bias, padding=(0, 1))
    return out


def norm_silu_conv(
    x: Tensor, norm: tuple[Tensor, Tensor], groups: int, eps: float, conv: tuple[Tensor, Tensor], in_place: bool
) -> Tensor:
    """conv(silu(group_norm(x))); norm, conv: weight and bias. in_place: the answer replaces x (C_in = C_out)."""
    x, (weight, bias) = channels_last(x), conv
    mean, var = statistics(x, groups)

    def rows(first: int, last: int) -> Tensor:
        return F.silu(normed(x[:, :, first:last], mean, var, *norm, eps), inplace=True)

    return convolved(rows, weight, bias, x if in_place else empty(x, len(weight), *x.shape[2:]))


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(twice(x)). x: (B, C, h, w), weight: (C_out, C, 3, 3). Returns (B, C_out, 2h, 2w)."""
    x, (height, width) = channels_last(x), x.shape[2:]
    out = empty(x, len(weight), 2 * height, 2 * width)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kernels = [[channels_last(k.to(weight.dtype)) for k in _halves(half, 3)] for half in _halves(wide, 2)]
    for first, last in _bands(x):
        around = F.pad(x[:, :, max(first - 1, 0) : last + 1], (1, 1, first == 0, last == height))
        for i in (0, 1):
            for j in (0, 1):
                seen = around[:, :, i : i + last - first + 1, j : j + width + 1]
                out[:, :, 2 * first + i : 2 * last : 2, j::2] = F.conv2d(channels_last(seen), kernels[i][j], bias)
    return out


def plus_pointwise(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + conv(x), in h's memory, of a 1x1 convolution."""
    for first, last in _bands(x):
        h[:, :, first:last] += F.conv2d(x[:, :, first:last], weight, bias)
    return h


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of a kernel three wide along dim, the two of two that even and odd positions of a doubled map amount to."""
    a, b, c = weight.split(1, dim)
    return torch.cat([a, b + c], dim), torch.cat([a + b, c], dim)


def _bands(x: Tensor, channels: int = 0) -> Iterator[tuple[int, int]]:
    """The first row and the one after the last of each band of x (B, C, h, w), all but the last of whole tiles.

    channels: of what the bands are made from; if these are more than x's, they count.
    """
    height, row = x.shape[2], x.nbytes // (x.shape[1] * x.shape[2]) * max(x.shape[1], channels)
    rows = max(1, BAND_BYTES // row // winograd.TILE) * winograd.TILE
    return ((first, min(first + rows, height)) for first in range(0, height, rows))
