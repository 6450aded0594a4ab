"""A float32 product of tokens and a weight on a CPU, by whichever library is the faster: torch's (MKL's), or oneDNN's.

On Intel's processors they are alike. On AMD's, oneDNN's takes 0.75 to 0.95 of MKL's time where there are many rows, 0.5
to 0.7 of it for 64 or 128. Measured on two cores of a fourth generation EPYC: 512 rows of 1280 to 10240 numbers 82 to
64 ms, 128 rows 30 to 17. In bfloat16 torch asks oneDNN anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models.once import once_differentiable
from models.processor import matrix_products_are_fast


def onednn_suits(x: Tensor) -> bool:
    """Whether oneDNN may be asked for products of x: on a CPU, but not of a plan's tensors, for which it has no kernel,
    nor under autocast or torch.compile, which cast, or choose, for themselves.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return plain and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def onednn_is_faster(x: Tensor) -> bool:
    """Whether it is faster, too, in x's dtype."""
    return onednn_suits(x) and x.dtype == torch.float32 and not matrix_products_are_fast()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, where nothing is recorded.

    x: (…, C_in), weight: (C_out, C_in), bias: (C_out,), of any strides, all of one dtype. Returns (…, C_out). Raises
    RuntimeError, torch's own, for shapes or dtypes that do not fit together.
    """
    fit = x.shape[-1:] == weight.shape[1:] and x.dtype == weight.dtype
    usual = fit and weight.numel() and (bias is None or bias.shape == weight.shape[:1] and bias.dtype == x.dtype)
    if not (usual and onednn_is_faster(x)):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, *in_one_piece(weight, bias), "none", [], "none")


def in_one_piece(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as oneDNN wants them: of a weight whose rows or columns lie apart, as of a part of a larger one, its product
    takes a thousand times as long; of such a bias it reads what lies between.

    weight: (C_out, C_in), bias: (C_out,), of any strides; themselves where they lie so, else copies.
    """
    dense = weight.is_contiguous() or weight.T.is_contiguous()
    return weight if dense else weight.contiguous(), None if bias is None else bias.contiguous()


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` with a gradient for x alone; none for the weights, and no second derivative. Shapes as there."""
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = product(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)      # oneDNN's is a view, and could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        return product(dy, ctx.saved_tensors[0].T), None, None
