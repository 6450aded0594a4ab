"""A module computes for a while with other weights than its own, of several threads one at a time."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.layout import converted
from models.mapped import mapped

my_turn = threading.RLock()     # of several threads one at a time has weights in a module's, or a window's, places


@contextmanager
def computing_with(module: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Within the block the module has these tensors in place of its parameters, in the order of `parameters_of`.

    To be used within `my_turn`, taken before the parameters are looked at.
    """
    slots = [(part, name) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    own = [part._parameters[name] for part, name in slots]
    try:
        for (part, name), weight in zip(slots, weights):
            part._parameters[name] = weight
        yield
    finally:
        for (part, name), parameter in zip(slots, own):
            part._parameters[name] = parameter


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Every parameter of a module and its parts."""
    return [p for part in module.modules() for p in part._parameters.values() if p is not None]


def lent(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Weights as a network computes with them for once: copies, or other maps of them.

    If one is trained, they are copies that autograd knows of.
    """
    if any(weight.requires_grad for weight in weights):
        return [weight.to(device, dtype) for weight in weights]
    (read,) = mapped([weights], device)
    if device.type == "cpu":
        return [converted(weight.anew(), device, dtype) for weight in read]
    return [weight.anew().to(device, dtype, copy=True) for weight in read]     # in a plan they seem to be there already
