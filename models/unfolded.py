"""A convolution as one matrix product: for weights that are far larger than the map they are laid over.

    y[l, o] = sum over c, i, j of x[l + (i, j), c] w[o, c, i, j]   =   patches(x) @ w^T,   w as (C_out, C_in k k),

or, where the weight lies channels-last, (C_out, k k C_in), which makes copies of whole positions of the patches.

A convolution's kernel brings the weight into an order of its own at every call; at the bottom of a UNet, 1280 channels
wide and 8x8 small, that takes most of its time, and as much memory as the weight. The product reads the weight as it
lies, in a file's memory map too. (Chellapilla et al. 2006, "im2col".) Measured on two cores, 2560 to 1280 channels of
8x8 in float32: 93 to 31 ms forward, 83 to 18 ms backward; from 32x32 on the copies of the patches cost more. A kernel
of 1x1 needs none: 1280 channels of 2x16x16, 6.1 to 5.5 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import empty
from models.products import product

Pair = tuple[int, int]
PART_BYTES = 12 * 2**20     # of patches that are made at a time, by nine copies that so meet in the processor's cache
SMALLER = 8     # a map is small if the weight has more than so many times its numbers, one of 1x1 more than them


def is_small(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """Whether a convolution of a map x (B, C, h, w) is better made here: one that keeps the size, or halves it."""
    k = weight.shape[2]
    fits = x.ndim == 4 and x.shape[1] == weight.shape[1]
    usual = fits and weight.shape[3] == k and k % 2 == 1 and padding == (k // 2, k // 2) and stride[0] == stride[1]
    if not usual or x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return weight.numel() > (1 if k == 1 else SMALLER) * x.numel() // stride[0] ** 2


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """x: (B, C_in, H, W), weight: (C_out, C_in, k, k), padded by k // 2. Returns (B, C_out, h, w), channels-last.

    Autograd cannot pass through it; `frozen` calls it where nothing is recorded. Its answer is no view of anything, so
    that it may be changed in place, as residual branches are.
    """
    height, width = ((side - 1) // stride + 1 for side in x.shape[2:])
    y, matrix, k = empty(x, len(weight), height, width), _matrix(weight), weight.shape[2]
    pixels, out = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)                                 # (B, h, w, C)
    padded = pixels if k == 1 else F.pad(pixels, (0, 0, *4 * (k // 2,)))
    rows = max(1, PART_BYTES // (width * matrix[0].nbytes))
    images = max(1, rows // height)
    for some, found in zip(padded.split(images), out.split(images)):
        for first in range(0, height, rows):
            part = found[:, first : first + rows]
            patches = _patches(some[:, stride * first :], weight, *part.shape[1:3], stride).reshape(-1, matrix.shape[1])
            part.copy_(product(patches, matrix, bias).view_as(part))
    return y


def gradient(dy: Tensor, weight: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
    """Of `convolved` by x, whose height and width are `size`. dy: (B, C_out, h, w).

    Returns (B, C_in, *size), channels-last; summed in float32.
    """
    channels, k, (height, width) = weight.shape[1], weight.shape[2], dy.shape[2:]
    patches = product(dy.permute(0, 2, 3, 1).reshape(-1, len(weight)), _matrix(weight).T)      # (B h w, C_in k k)
    if k == stride == 1:
        return patches.view(-1, height, width, channels).permute(0, 3, 1, 2)
    patches = patches.view(-1, height, width, *((k * k, channels) if _is_last(weight) else (channels, k * k)))
    places = patches.unbind(-2 if _is_last(weight) else -1)                                    # (B, h, w, C_in) each
    edge, wide = k // 2, torch.promote_types(dy.dtype, torch.float32)
    dx = dy.new_zeros(len(dy), size[0] + 2 * edge, size[1] + 2 * edge, channels, dtype=wide)
    for i in range(k):
        for j in range(k):
            dx[:, i : i + stride * height : stride, j : j + stride * width : stride] += places[i * k + j]
    return dx[:, edge : edge + size[0], edge : edge + size[1]].permute(0, 3, 1, 2).to(dy.dtype)


def _patches(x: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """What positions of the answer see of a padded map (B, H, W, C_in), (B, h, w, …), in the order of the weight."""
    k = weight.shape[2]
    if k == stride == 1:
        return x[:, :height]
    x = x[:, : stride * (height - 1) + k]
    if _is_last(weight):
        return x.unfold(1, k, stride).unfold(2, k, stride).permute(0, 1, 2, 4, 5, 3)           # (B, h, w, k, k, C_in)
    seen = [x[:, i : i + stride * height : stride, j : j + stride * width : stride] for i in range(k) for j in range(k)]
    return torch.stack(seen, dim=-1)                                                           # (B, h, w, C_in, k k)


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, C_in, k, k) -> (C_out, C_in k k) in the order in which it lies, the same memory."""
    return (weight.permute(0, 2, 3, 1) if _is_last(weight) else weight).flatten(1)


def _is_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)
