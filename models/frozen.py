"""Operations whose weights do not learn: they keep only what the gradient of their input needs.

Autograd keeps what each single operation may need: of a convolution its input, which only the gradient of the weight
reads; of a gate its factors, which are quickly computed anew. Here a convolution keeps its weight and nothing else,
and GEGLU the projection that it halves. (Group norm has a file of its own. A linear layer and a layer norm of frozen
weights keep no more than they need under autograd itself.) No second derivative.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Pair = tuple[int, int]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """A convolution that keeps nothing of its input. x: (B, C_in, h, w), weight: (C_out, C_in, k, k)."""
    return _Conv2d.apply(x, weight, bias, stride, padding)


def geglu(projected: Tensor) -> Tensor:
    """value * gelu(gate), of a tensor (…, 2C) that holds both; it keeps that and returns (…, C)."""
    return _GEGLU.apply(projected)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, h, w), laid out in memory as it is fastest: on a CPU with the channels of a position side by side.

    Elsewhere nothing was measured, and nothing is moved.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        return channels_last(F.conv2d(_as_suits(x, weight), weight, bias, stride, padding))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        reached = [
            (n - 1) * s - 2 * p + k for n, s, p, k in zip(d_out.shape[2:], ctx.stride, ctx.padding, weight.shape[2:])
        ]
        beyond = [size - end for size, end in zip(ctx.size, reached)]      # rows that a stride left out at the end
        dx = F.conv_transpose2d(_as_suits(d_out, weight), weight, None, ctx.stride, ctx.padding, beyond)
        return channels_last(dx), None, None, None, None


def _as_suits(x: Tensor, weight: Tensor) -> Tensor:
    """Channels-last, unless that costs more than it brings.

    A weight that is not stored that way (a file's memory map) is brought into it at every call; where it is far larger
    than the map, the map is laid out in the weight's way instead. Measured at 1280 channels of 16x16: 99 to 145 ms.
    """
    stored_plain = weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous() if stored_plain and weight.numel() > 8 * x.numel() else channels_last(x)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        value, gate = projected.chunk(2, dim=-1)
        d_projected = torch.empty_like(projected)
        d_value, d_gate = d_projected.chunk(2, dim=-1)
        torch.mul(d_out, F.gelu(gate), out=d_value)
        torch.ops.aten.gelu_backward.grad_input(d_out * value, gate, grad_input=d_gate)
        return d_projected
