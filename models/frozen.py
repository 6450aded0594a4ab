"""Operations whose weights do not learn: they keep only what the gradient of their input needs.

Autograd keeps what each single operation may need: of a convolution its input, which only the gradient of the weight
reads; of a gate its factors, which are quickly computed anew. Here a convolution keeps its weight and nothing else,
and GEGLU the projection that it halves. (Group norm has a file of its own. A linear layer and a layer norm of frozen
weights keep no more than they need under autograd itself.) No second derivative, see `once`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models import unfolded, winograd
from models.checkpointing import dear
from models.layout import laid_out
from models.once import once_differentiable

Pair = tuple[int, int]
FEWER = 8     # times fewer channels out than in: there torch's transposed convolution took 20 ms, a plain one 0.6


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair = (1, 1), padding: Pair = (0, 0)) -> Tensor:
    """A convolution that keeps nothing of its input. x: (B, C_in, h, w), weight: (C_out, C_in, k, k)."""
    return _Conv2d.apply(x, weight, bias, stride, padding)


def geglu(projected: Tensor) -> Tensor:
    """value * gelu(gate), of a tensor (…, 2C) that holds both; it keeps that and returns (…, C)."""
    return _GEGLU.apply(projected)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        ctx.tiles = winograd.is_worth_it(x, weight, stride, padding)
        ctx.unfolds = not ctx.tiles and unfolded.is_small(x, weight, stride, padding)

        def convolved() -> Tensor:
            if ctx.tiles:
                return laid_out(winograd.convolved(x, weight, bias))
            if ctx.unfolds:
                return laid_out(unfolded.convolved(x, weight, bias, stride[0]))
            return laid_out(F.conv2d(laid_out(x), weight, bias, stride, padding))

        return dear(weight[0].numel(), convolved)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.saved_tensors[0].to(dy.dtype)                      # another one than dy's if autocast made y
        if ctx.tiles:
            dx = winograd.gradient(dy, weight)
        elif ctx.unfolds:
            dx = unfolded.gradient(dy, weight, ctx.size, ctx.stride[0])
        elif ctx.stride == (1, 1) and FEWER * len(weight) <= weight.shape[1] and min(_rest(weight, ctx.padding)) >= 0:
            dx = F.conv2d(laid_out(dy), weight.transpose(0, 1).flip(2, 3), padding=_rest(weight, ctx.padding))
        else:
            reached = [
                (n - 1) * s - 2 * p + k for n, s, p, k in zip(dy.shape[2:], ctx.stride, ctx.padding, weight.shape[2:])
            ]
            beyond = [size - end for size, end in zip(ctx.size, reached)]      # rows that a stride left out at the end
            dx = F.conv_transpose2d(laid_out(dy), weight, None, ctx.stride, ctx.padding, beyond)
        return laid_out(dx), None, None, None, None


def _rest(weight: Tensor, padding: Pair) -> list[int]:
    """How a gradient is padded, for each of its pixels to be under every pixel of the kernel once."""
    return [k - 1 - p for k, p in zip(weight.shape[2:], padding)]


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
