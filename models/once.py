"""Backward passes by hand give a first derivative, and refuse to be differentiated again.

torch's decorator of the same name leaves two gaps. Where dy needs no gradient, what it returns counts as constant.
Where dy does, its error waits on a path that leads to no input, and `torch.autograd.grad` walks only the paths to the
inputs that it is asked for. A second derivative was then the sum of all other parts, and nothing was said.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import FunctionCtx


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.autograd.Function`'s backward that raises RuntimeError where it is recorded, by create_graph=True.

    And for several gradients at once (is_grads_batched, vectorize), if it writes into memory of its own, as most do.
    """

    @functools.wraps(backward)
    def only_once(ctx: FunctionCtx, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for what could be differentiated twice, and checkpoints, attention in slices "
                "and layers with frozen weights have no second derivative: leave it out"
            )
        try:
            return backward(ctx, *gradients)
        except RuntimeError as error:
            if not any(isinstance(dy, Tensor) and is_legacy_batchedtensor(dy) for dy in gradients):
                raise
            raise RuntimeError(
                "vectorize or is_grads_batched asks for several gradients at a time, and checkpoints, attention "
                "in slices and layers with frozen weights give one at a time: leave it out"
            ) from error

    return only_once
