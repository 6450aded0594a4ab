"""Networks that wait in host memory, and are on the device only while they compute.

"idle": the text transformer and the VAE; the UNet stays. "stream": these, and the UNet's layers pass through a window
(see `streaming`). What waits keeps its own dtype and stays the memory map of its file, if it is one.

On a CPU the device is the host memory. There a file's map takes the window's place: what computes reads its weights in
a map of its own, see `mapped`, and a network takes memory while it runs, a streamed one a layer at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from models.checkpointing import checkpoint
from models.first_run import FirstRun
from models.lending import computing_with, lent, my_turn, parameters_of

Offload = Literal["none", "idle", "stream"]


@contextmanager
def present(model: Any, network: nn.Module) -> Iterator[None]:
    """Within the block a network of a model computes on the model's device, in the dtype that it runs in.

    If it waits elsewhere, it does so with copies of its weights, or other maps of them, which go with the block.
    """
    if model.offload == "none":
        yield
    else:
        with my_turn, computing_with(network, lent(parameters_of(network), model.device, runs_in(network))):
            yield


def runs_in(network: nn.Module) -> torch.dtype:
    """The dtype that a network of a model computes in, which is not that of its weights while they wait."""
    return getattr(network, "runs_in", None) or next(network.parameters()).dtype


def visit(model: Any, network: nn.Module, *inputs: Any) -> Any:
    """network(*inputs), a tuple. Weights that wait elsewhere are not kept for the backward pass, but fetched again.

    Raises RuntimeError in the backward pass if it was changed meanwhile.
    """
    if model.offload == "none":
        return network(*inputs)

    first = FirstRun(network)

    def run(*inputs: Any) -> Any:
        with my_turn:
            first.require_unchanged()
            with present(model, network):
                return tuple(network(*inputs))

    return checkpoint(run, *inputs, weights=[each.weight for each in first.weights])
