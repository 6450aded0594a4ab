"""A 3x3 convolution in float32 with a quarter of its multiplications: Winograd's F(4x4, 3x3).

The 4 numbers that a kernel g of 3 gives on 6 numbers d are coefficients of a product of polynomials. Values at five
points and at infinity determine them, and at a point a product of polynomials is one multiplication: 6 instead of 12.
Along both axes of a map, with sums over channels between,

    Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A        (36 instead of 144),

which makes 36 matrix products of tiles and channels. (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural
Networks", section 4.) Measured on two cores, maps of two images: 320 channels of 64x64: 43 to 21 ms, 1280 to 640 of
32x32: 85 to 43.

Tiles and kernels are brought to the points in batches, a tile or six points at a time, not as one product: a batch's
entries are shared out whole, where of one product torch's threads come to write what the other had in its cache. Where
two cores share none, as a virtual machine's may at one time and not at another, 160 kernels of 640 channels took
2.8 ms as one product and 1.15 so; where they share one, 1.1 and 1.05.

How much is rounded depends on the points. With 0, ±2/3, ±3/2 the error is 1.6e-6 of the answer's deviation; torch's
convolution of channels-last maps has 0.9e-6 to 1.3e-6, of maps that lie a channel at a time 0.25e-6, and the customary
points 0, ±1, ±2 have 3.6e-6. It is an error of the whole tile: next to a number that is 10,000 times as large as its
neighbours, they are right to 1e-2 only; what is not finite makes all pixels of the tiles that see it NaN.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import channels_last, empty
from models.processor import LANES

Pair = tuple[int, int]
TILE, SEEN = 4, 6               # pixels of an answer's tile along an axis, and of what it is made from
POINTS = Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)
CHANNELS = 128                  # of both maps: from these on, and from so many pixels, it is the quicker way
PIXELS = 512                    # of all images
ROOM = 128 * 1280               # places of tiles, and of products, that are kept at their 36 points at a time
ROOM_OF_KERNELS = 64 * 1280     # and of kernels


def is_worth_it(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """Whether a convolution of a map x (B, C, h, w) is better made here: float32 on a CPU, sides of whole tiles."""
    fits = x.ndim == 4 and weight.shape[1:] == (x.shape[1], 3, 3) and stride == padding == (1, 1)
    suits = fits and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not suits or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():   # which would unroll its loops
        return False
    whole = not any(side % TILE for side in x.shape[2:])
    return whole and x[:, 0].numel() >= PIXELS and min(weight.shape[:2]) >= CHANNELS


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, edges: int = 1, turned: bool = False) -> Tensor:
    """x: (B, C_in, H, W), padded by 1; weight: (C_out, C_in, 3, 3); float32. H and W are multiples of 4.

    edges 0: x has a row more above and below, which are not padded then: (B, C_in, H + 2, W). turned: each kernel, by
    half. Returns (B, C_out, H, W), channels-last. Autograd cannot pass through it; `frozen` and `bands` call it where
    nothing is recorded.
    """
    BT, G, AT = (x.new_tensor(M) for M in matrices())
    G, C = (G.flip(1) if turned else G).view(SEEN, SEEN, -1), x.shape[1]
    y = empty(x, len(weight), x.shape[2] + 2 * edges - 2, x.shape[3])
    answers = y.permute(0, 2, 3, 1).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))          # (B, h, 4, w, 4, C_out)
    parts, most = _parts(y, C)
    groups = _slices(len(weight), min(ROOM // most, ROOM_OF_KERNELS // C), LANES)
    some = groups[0].stop
    # one: tiles, then products; two: tiles at the points; three: kernels at the points, then sums
    one, two, three = (x.new_empty(SEEN**2 * n) for n in (most * max(C, some), most * C, some * max(C, most)))
    for images, rows in parts:
        seen = _tiles(channels_last(x)[images], rows, edges)                                   # (b, h, w, 6, 6, C)
        gathered = _of(one, *seen.shape).copy_(seen).view(-1, SEEN**2, C)
        d = torch.bmm(BT.expand(len(gathered), -1, -1), gathered, out=_of(two, *gathered.shape))   # (tiles, 36, C)
        for group in groups:
            taps = weight[group].permute(2, 3, 0, 1).reshape(9, -1)
            g = torch.bmm(G, taps.expand(SEEN, -1, -1), out=_of(three, SEEN, SEEN, taps.shape[1]))
            g = g.view(SEEN**2, -1, C)                                                         # (36, group, C)
            products = torch.bmm(d.transpose(0, 1), g.mT, out=_of(one, SEEN**2, len(d), g.shape[1])).view(SEEN**2, -1)
            sums = torch.mm(AT, products, out=_of(three, TILE**2, products.shape[1]))          # (16, tiles * group)
            sums = sums.view(TILE, TILE, *seen.shape[:3], -1).permute(2, 3, 0, 4, 1, 5)        # (b, h, 4, w, 4, group)
            out = answers[images, rows, ..., group]
            out.copy_(sums) if bias is None else torch.add(sums, bias[group], out=out)
    return y


def gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Of `convolved` by x: the convolution with the kernels turned by half. dy: (B, C_out, H, W)."""
    return convolved(dy, weight.transpose(0, 1), None, turned=True)


def _tiles(x: Tensor, rows: slice, edges: int) -> Tensor:
    """What some rows of tiles are made from, padded: (B, C, H, W) -> (B, h, w, 6, 6, C)."""
    first, end = TILE * rows.start - edges, TILE * rows.stop + 2 - edges
    around = 0, 0, 1, 1, int(first < 0), int(end > x.shape[2])
    padded = F.pad(x.permute(0, 2, 3, 1)[:, max(first, 0) : end], around)                      # (B, 4 h + 2, W + 2, C)
    return padded.unfold(1, SEEN, TILE).unfold(2, SEEN, TILE).permute(0, 1, 2, 4, 5, 3)


def _of(memory: Tensor, *size: int) -> Tensor:
    """The beginning of a vector, in a shape."""
    return memory[: math.prod(size)].view(size)


def _parts(y: Tensor, channels: int) -> tuple[list[tuple[slice, slice]], int]:
    """Images and rows of tiles of the answer that are made at a time, and how many tiles a part has at most."""
    batch, height, width = len(y), y.shape[2] // TILE, y.shape[3] // TILE
    fits = ROOM // (width * channels)
    images, rows = _slices(batch, fits // height), _slices(height, fits)
    return [(i, r) for i in images for r in rows], images[0].stop * rows[0].stop * width


def _slices(total: int, largest: int, multiple: int = 1) -> list[slice]:
    """range(total) in slices of about equal size, all but the last a multiple, of at most `largest` or one multiple."""
    largest = max(1, largest // multiple) * multiple
    each = math.ceil(total / math.ceil(total / largest) / multiple) * multiple
    return [slice(first, min(first + each, total)) for first in range(0, total, each)]


@functools.cache
def matrices() -> tuple[list[list[float]], ...]:
    """B^T, G and A^T along both axes at once: (36, 36), (36, 9) and (16, 36).

    Row i of A^T and of G are the powers of the points, G's divided by the product of the differences to the other
    points; row i of B^T is the polynomial that vanishes at these. (Toom and Cook's algorithm, transposed.) No tensors:
    they would belong to the mode, a plan's perhaps, in which they were first asked for.
    """
    AT = [[p**i for p in POINTS] + [Fraction(i == TILE - 1)] for i in range(TILE)]
    G, BT = [], []
    for p in POINTS:
        others = [q for q in POINTS if q != p]
        G.append([p**i / math.prod(p - q for q in others) for i in range(3)])
        BT.append([*_vanishing_at(others), Fraction(0)])
    G.append([Fraction(0), Fraction(0), Fraction(1)])
    BT.append(_vanishing_at(POINTS))
    return tuple([[float(a * b) for a in r for b in s] for r in M for s in M] for M in (BT, G, AT))


def _vanishing_at(points: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of all (x - point)."""
    coefficients = [Fraction(1)]
    for p in points:
        coefficients = [above - p * here for above, here in zip([0, *coefficients], [*coefficients, 0])]
    return coefficients
