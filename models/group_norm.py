"""Group norm with frozen weights, with what usually follows it: one operation, of which the input alone is kept whole.

    y = (x - mean) / sqrt(var + eps) * weight + bias,   of each group of channels of each sample    (Wu & He 2018)

torch's own group norm of channels-last maps on a CPU takes the variance as E[x²] - E[x]²: where the mean is a hundred
times the deviation, float32 leaves 1 % wrong (measured; the embedded autoencoder's small activations suffer from it).
So there the statistics come from torch's batch norm, which subtracts the mean first: each sample is a batch of its
own, and the variance of a group is the mean of its channels' variances and of their means' distances.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models.layout import laid_out
from models.once import once_differentiable


def frozen_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """group_norm(x) * (1 + scale) + shift, then perhaps SiLU; it keeps x, its statistics, scale and shift.

    x: (B, C, h, w); weight, bias: (C,); scale, shift: (B, C, 1, 1), both or neither. Gradients of x, scale and shift.
    """
    return _GroupNorm.apply(x, scale, shift, weight, bias, groups, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor,
        groups: int, eps: float, silu: bool,
    ) -> Tensor:  # fmt: skip
        moments = () if plainly(x) else statistics(x, groups)
        ctx.save_for_backward(x, scale, shift, weight, bias, *moments)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        y = normed(x, *moments, weight, bias, eps) if moments else normalised(x, weight, bias, groups, eps)[0]
        if scale is not None:
            y.mul_(1 + scale).add_(shift)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, bias, *moments = ctx.saved_tensors
        y, mean, rstd = normalised(x, weight, bias, ctx.groups, ctx.eps, *moments)
        dx = d_scale = d_shift = None
        if ctx.silu:
            dy = torch.ops.aten.silu_backward(dy, y if scale is None else torch.addcmul(shift, y, 1 + scale))
        if scale is not None:
            d_scale, d_shift = y.mul_(dy).sum((2, 3), keepdim=True), dy.sum((2, 3), keepdim=True)
            dy = dy * (1 + scale)
        if ctx.needs_input_grad[0]:
            x, dy = (laid_out(each) if each.device.type == "cpu" else each.contiguous() for each in (x, dy))
            sizes = len(x), x.shape[1], x.shape[2:].numel(), ctx.groups
            dx, _, _ = torch.ops.aten.native_group_norm_backward(
                dy, x, mean, rstd, weight.to(mean.dtype), *sizes, [True, False, False]
            )
        return dx, d_scale, d_shift, None, None, None, None, None


def plainly(x: Tensor) -> bool:
    """Whether torch's own group norm is as exact as it should be."""
    return x.device.type != "cpu" or x.is_contiguous()


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, mean: Tensor | None = None,
    var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The group norm of x (B, C, h, w) in x's dtype, and each group's mean and 1 / sqrt(var + eps), (B, groups).

    mean, var: those of `statistics`; None lets torch do all, whose kernels before 2.14 read maps on a GPU as if they
    were contiguous, and take weights of the maps' dtype only.
    """
    if mean is None or var is None:
        if x.device.type != "cpu":
            x, weight, bias = x.contiguous(), weight.to(x.dtype), bias.to(x.dtype)
        return torch.native_group_norm(x, weight, bias, len(x), x.shape[1], x.shape[2:].numel(), groups, eps)
    first_of_group = slice(None, None, x.shape[1] // groups)
    y = normed(x, mean, var, weight, bias, eps)
    # contiguous: torch 2.13 reads the mean in its gradient as if it were
    return y, mean[:, first_of_group].contiguous(), (var[:, first_of_group].contiguous() + eps).rsqrt()


def statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the group of each channel, (B, C) in at least float32. x: (B, C, h, w), on a CPU."""
    unused = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))       # running means, untouched
    found = [each for one in x.split(1) for each in torch.batch_norm_update_stats(one, unused, unused, 0.0)]
    means, variances = torch.stack(found).view(len(x), 2, groups, -1).unbind(1)                # (B, groups, C/g) both
    mean = means.mean(dim=2, keepdim=True)                                                     # (B, groups, 1)
    var = (variances + (means - mean).square()).mean(dim=2, keepdim=True)
    return mean.expand_as(means).flatten(1), var.expand_as(means).flatten(1)


def normed(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias. x: (B, C, h, w), on a CPU; mean, var: those of `statistics`."""
    y, weight, bias, unused = torch.empty_like(x), weight.to(mean), bias.to(mean), mean.new_empty(0)
    for one, out, m, v in zip(x.split(1), y.split(1), mean, var):
        torch.native_batch_norm(one, weight, bias, m, v, False, 0.0, eps, out=(out, unused, unused))
    return y
