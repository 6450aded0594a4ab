"""Backward passes by hand give a first derivative; of a second one they say that there is none.

torch's decorator of the same name leaves gaps: where dy needs no gradient, it gives constants, and otherwise its error
stands aside of every way back to an input, where `torch.autograd.grad` passes it by. What else a second derivative is
made of was then summed without these parts, and nothing was said.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.autograd.Function`'s backward that raises RuntimeError where it is recorded, by create_graph=True."""

    @functools.wraps(backward)
    def only_once(ctx: FunctionCtx, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for what could be differentiated twice, and checkpoints, attention in slices "
                "and layers with frozen weights have no second derivative: leave it out"
            )
        return backward(ctx, *gradients)

    return only_once
