"""What stands in for a model's weights and for a device in a plan: tensors that have sizes and no numbers.

For a CPU these are torch's FakeTensors; those of CUDA need a driver to go backward, so a plan for CUDA runs on the meta
device, and its fused attention is the operation that calls CUDA's kernel.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inversion.memory import LiveMemory, cpu_workspace, cuda_workspace
from models import Setting
from models import sliced_attention as slices
from models.copying import PLACES, CopyAtOnce
from models.lending import parameters_of
from models.mapped import Mapped
from models.setting import place
from models.weights import choose_dtype, on_meta

CPU, META = torch.device("cpu"), torch.device("meta")
CUDA_BLOCK = 512        # bytes: what the caching allocator rounds up to

_one_at_a_time = threading.RLock()      # of several threads that plan: what they put in place is everyone's


def without_weights(model: Any) -> Any:
    """A model like another, without its upsampler, with its encoder, on the meta device."""
    networks = {name: on_meta(partial(type(part), part.config)) for name, part in model.networks().items()}
    others = {"upsampler": None, "released": False}
    others = {name: value for name, value in others.items() if getattr(model, name, value) != value}
    return replace(model, **networks, **others)


def placed(shell: Any, setting: Setting, where: torch.device, memory: LiveMemory) -> tuple[Any, set[int]]:
    """The model run as a setting says, with weights without numbers, and the ids of those that wait; the others, on the
    device, are held in memory.
    """
    _write(shell.networks().values(), choose_dtype(setting.dtype, setting.dtype, where), where)
    model = replace(shell)
    waiting = _waiting(model, setting.offload)
    with memory:
        place(model, setting, where, CopyAtOnce(1 if where == CPU else PLACES))
        memory.hold(p for p in every_parameter(model) if id(p) not in waiting)
    return model, waiting


def _write(networks: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Give networks weights without numbers in place of those that they have."""
    for module in (module for network in networks for module in network.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.empty(p.shape, dtype=dtype, device=device)


def _waiting(model: Any, offload: str) -> set[int]:
    """Which weights wait in host memory, by their id."""
    idle = [part for name, part in model.networks().items() if name != "unet"] if offload != "none" else []
    layers = model.unet.layers() if offload == "stream" else []
    return {id(p) for part in (*idle, *layers) for p in parameters_of(part)}


def every_parameter(model: Any) -> list[Tensor]:
    """Those of all its networks."""
    return [p for network in model.networks().values() for p in parameters_of(network)]


def fake_device(device: torch.device) -> tuple[torch.device, AbstractContextManager, LiveMemory]:
    """Where tensors without numbers lie for a device, in which mode, and what follows them."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # which brings half of torch along

    if device.type == "cpu":
        return CPU, FakeTensorMode(allow_non_fake_inputs=True), LiveMemory("cpu", cpu_workspace, 1)
    return META, nullcontext(), LiveMemory("meta", cuda_workspace, CUDA_BLOCK)


@contextmanager
def as_on(device: torch.device, memory: LiveMemory) -> Iterator[None]:
    """Within the block attention on tensors without numbers is what it is on a device.

    For fused attention on meta tensors torch would take the formula, with all scores. Here it takes memory-efficient
    attention, which every CUDA device has; flash attention keeps and takes the same. Slices are all alike: one is run,
    and its operations are counted for all. What a CPU reads of weights that wait is in its memory then.
    """

    def efficient(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, keeps, 0.0, is_causal)[0]

    def one_for_all(q: Tensor, heads: int) -> Iterator[tuple[int, slice]]:
        count = q.shape[0] * -(-q.shape[1] // heads)
        memory.times *= count
        yield 0, slice(0, heads)
        memory.times //= count

    here, on_cpu = threading.get_ident(), device.type == "cpu"

    def instead(owner: Any, name: str, replacement: Callable[..., Any]) -> AbstractContextManager:
        """In this thread. Others go on with what they do, and with what is usual."""
        usual = getattr(owner, name)
        return patch.object(
            owner, name, lambda *args, **how: (replacement if threading.get_ident() == here else usual)(*args, **how)
        )

    with _one_at_a_time, ExitStack() as stack:
        stack.enter_context(instead(slices, "some_heads", one_for_all))
        if on_cpu:
            stack.enter_context(instead(Mapped, "anew", lambda mapped: torch.empty_like(mapped.weight)))
        else:
            stack.enter_context(instead(F, "scaled_dot_product_attention", efficient))
        yield
