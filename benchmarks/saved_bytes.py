"""What autograd keeps between the forward and the backward pass of an inversion step, and what each measure takes off.

    python benchmarks/saved_bytes.py [--json FILE]

The UNet of Stable Diffusion 1.5 at 512x512, batch 1, bfloat16, only the context wanting a gradient: on fake tensors,
which have sizes and no numbers, so nothing is computed and no time is measured. Each line adds a measure to those
before it; the peer is autograd without any, with a gradient of every input.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _measure import command, row
from _process import Work
from _saved_bytes import SavedBytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.presets import SD1
from models.unet import UNet
from models.weights import on_meta


def plain_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = False, *unused: None
) -> Tensor:
    """Without the measure."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def plain_geglu(projected: Tensor) -> Tensor:
    """Without the measure."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


MEASURES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "a convolution keeps its weight only": ("models.frozen.conv2d", F.conv2d),
    "group norm and SiLU keep one input": ("models.layers.frozen_group_norm", plain_group_norm),
    "GEGLU keeps its projection": ("models.transformer.geglu", plain_geglu),
}


@contextmanager
def without(measures: list[str]) -> Iterator[None]:
    """Run these operations as autograd itself would."""
    with ExitStack() as stack:
        for measure in measures:
            stack.enter_context(patch(*MEASURES[measure]))
        yield


def saved(off: list[str], checkpointing: str, everywhere: bool = False) -> int:
    """Bytes that a forward pass keeps, without some measures; everywhere: as if x_t wanted a gradient, too."""
    unet = on_meta(lambda: UNet(SD1.unet))
    shapes = {name: weight.shape for name, weight in unet.state_dict().items()}
    with FakeTensorMode(), without(off):
        weights = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        unet.load_state_dict(weights, assign=True)
        unet.requires_grad_(False)
        x, context = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16), torch.empty(1, 77, 768, dtype=torch.bfloat16)
        x.requires_grad_(everywhere)
        with SavedBytes(*unet.parameters()) as counter:
            unet(x, torch.empty(1), context.requires_grad_(), checkpointing=checkpointing)
        return counter.bytes


def measure() -> Iterator[dict[str, Any]]:
    """A row a measure; the peer's bytes are those of autograd where everything wants a gradient."""
    measures = list(MEASURES)
    peer = saved(measures, "none", everywhere=True)
    found = {"nothing before the context's first use": saved(measures, "none")}
    found |= {measure: saved(measures[i + 1 :], "none") for i, measure in enumerate(measures)}
    found |= {f"checkpointing: {level}": saved([], level) for level in ("attention", "blocks")}
    for what, count in found.items():
        yield row(Work(what, "bfloat16", 512), None, None, count, peer)


if __name__ == "__main__":
    command(__doc__, measure)
