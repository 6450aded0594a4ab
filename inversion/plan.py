"""Does it fit? What a training would take in each setting, before anything is loaded or any device is there.

The step that would be trained with runs on tensors that have sizes and no numbers: an image through the
encoder, prompts through the text transformer, the UNet, the loss, and back to the vectors. `memory` follows what lives
meanwhile and counts what is computed. What is predicted is all that torch allocates on the device, weights included;
not the driver's own memory (a CUDA context takes 0.3 to 0.5 GiB), nor the program's.

For a CPU these are torch's FakeTensors; those of CUDA need a driver to go backward, so a plan for CUDA runs on the meta
device, and its fused attention is the operation that calls CUDA's kernel.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Schedule
from inversion.choice import Planned, settings_for
from inversion.errors import InversionError
from inversion.memory import LiveMemory, cpu_workspace, cuda_workspace
from inversion.objective import Batch, loss_and_gradient
from inversion.prompts import SLOT
from models import ModelError, Setting, outline
from models import sliced_attention as slices
from models.copying import CopyAtOnce
from models.devices import choose_device
from models.mapped import Mapped
from models.setting import place
from models.streaming import parameters_of
from models.weights import choose_dtype, on_meta

CPU, META = torch.device("cpu"), torch.device("meta")
CUBLAS = 8_519_680      # bytes that its workspace takes (CUDA's documentation, cublasSetWorkspace: 2 x 4 MiB and more)
HEAP = 64 * 2**20       # freed bytes that a CPU's heap may keep (glibc, mallopt(3): M_TRIM_THRESHOLD, twice 32 MiB)
CUDA_BLOCK = 512        # bytes: what the caching allocator rounds up to
LARGEST = 4096          # pixels a side: of many more, the slices of attention take minutes to follow

_one_at_a_time = threading.RLock()      # of several threads that plan: what they put in place is everyone's


def plan(
    model: Any, resolution: int | None = None, batch_size: int = 1, device: torch.device | str = "cuda",
    settings: Iterable[Setting] | None = None,
) -> list[Planned]:  # fmt: skip
    """What a training would take: one entry a setting, in the settings' order.

    model: a model, or what `models.load` takes; weights need not be there. resolution: side of the images in pixels,
    None for the model's own. batch_size: samples through the network at once. device: need not be there. settings:
    None for all that make sense on the device, see `settings_for`.

    Raises ModelError for a source that nothing is known of, a model that reads no text, a resolution that the model
    cannot halve, a device other than a CPU or CUDA's, and float16 on a CPU; InversionError for a batch of none and for
    images of more than `LARGEST` a side.
    """
    return list(one_by_one(model, resolution, batch_size, device, settings))


@torch.inference_mode(False)
def one_by_one(
    model: Any, resolution: int | None, batch_size: int, device: torch.device | str, settings: Iterable[Setting] | None
) -> Iterator[Planned]:
    """The entries of `plan`, each planned when it is asked for; arguments and errors as there."""
    shell, device, side = _asked(model, device, resolution, batch_size)
    encoding = cache(partial(_encoding, shell, device, side))
    for setting in settings_for(device) if settings is None else settings:
        yield _predicted(shell, setting, device, side, batch_size, *encoding(_encodes(setting)))


@torch.inference_mode(False)
@torch.no_grad()
def drawing(
    model: Any, setting: Setting, resolution: int | None = None, batch_size: int = 1,
    device: torch.device | str = "cuda",
) -> int:  # fmt: skip
    """The peak in bytes on the device of drawing images with guidance, and of decoding them; without an upsampler.

    Arguments and errors as for `plan`. Training and drawing may differ in what is the most: the one goes back, the
    other reads two prompts an image and decodes.
    """
    shell, device, side = _asked(model, device, resolution, batch_size)
    shape, (where, fake, memory) = shell.x0_shape(side, side), _followed(device)
    with fake, as_on(device, memory):
        model, _ = _placed(shell, setting, where, memory)
        with memory:
            features = model.encode_text(model.tokenizer.encode([""] * batch_size + ["a word"] * batch_size))
            shown = len(features.context) // (2 if getattr(model, "shares", False) else 1)
            x, t = torch.empty(shown, *shape, device=where), torch.zeros(shown, device=where)
            model.predict(x, t, features)
            model.decode(x[:batch_size])
    return _in_all(memory, device)


def _asked(
    model: Any, device: torch.device | str, resolution: int | None, batch_size: int
) -> tuple[Any, torch.device, int]:
    """The arguments of `plan`, understood: a model without weights, the device, the side of its images."""
    device = choose_device(device, must_be_there=False)
    shell = _shell(outline(model) if isinstance(model, str | Path) else model)
    if not shell.width:
        raise ModelError(f"{shell.source} is told classes: it reads no text, and so no word can be taught to it")
    if batch_size < 1:
        raise InversionError(f"batch_size must be at least 1, not {batch_size}")
    side = shell.resolution if resolution is None else resolution
    if side > LARGEST:
        raise InversionError(f"plans are made for images of up to {LARGEST} pixels a side, not of {side}")
    shell.x0_shape(side, side)
    return shell, device, side


def _encodes(setting: Setting) -> Setting:
    """What of a setting matters when an image is encoded, once before all steps."""
    return Setting(setting.dtype, "blocks", offload=setting.offload)


def _encoding(shell: Any, device: torch.device, side: int, setting: Setting) -> tuple[tuple[int, ...], int]:
    """The shape of an image's moments, and the peak of encoding it."""
    where, fake, memory = _followed(device)
    with fake, as_on(device, memory):
        model, _ = _placed(shell, setting, where, memory)
        with memory:
            moments = model.moments(torch.empty(1, 3, side, side, device=where))
    return moments.shape[1:], _in_all(memory, device)


def _predicted(
    shell: Any, setting: Setting, device: torch.device, side: int, batch_size: int, moments: Sequence[int], least: int
) -> Planned:
    """What a step takes, its encoder let go, and computes. moments: of an image; least: the peak of encoding it."""
    where, fake, memory = _followed(device)
    released = replace(shell)
    released.release_encoder()
    with fake, as_on(device, memory):
        model, waiting = _placed(released, setting, where, memory)
        with memory:
            _step(model, moments, model.x0_shape(side, side), batch_size, where)
    moved = 2 * sum(p.nbytes for p in _parameters(model) if id(p) in waiting)        # forward, and backward again
    return Planned(setting, max(least, _in_all(memory, device)), memory.flops, moved)


def _followed(device: torch.device) -> tuple[torch.device, AbstractContextManager, LiveMemory]:
    """Where tensors without numbers lie for a device, in which mode, and what follows them."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # which brings half of torch along

    if device.type == "cpu":
        return CPU, FakeTensorMode(allow_non_fake_inputs=True), LiveMemory("cpu", cpu_workspace, 1)
    return META, nullcontext(), LiveMemory("meta", cuda_workspace, CUDA_BLOCK)


def _placed(shell: Any, setting: Setting, where: torch.device, memory: LiveMemory) -> tuple[Any, set[int]]:
    """The model run as a setting says, with weights without numbers, and the ids of those that wait; the others, on the
    device, are held in memory.
    """
    _write(shell.networks().values(), choose_dtype(setting.dtype, setting.dtype, where), where)
    model = replace(shell)
    waiting = _waiting(model, setting.offload)
    with memory:
        place(model, setting, where, CopyAtOnce())
        memory.hold(p for p in _parameters(model) if id(p) not in waiting)
    return model, waiting


def _in_all(memory: LiveMemory, device: torch.device) -> int:
    return memory.peak + (HEAP if device.type == "cpu" else CUBLAS)


def _step(model: Any, moments: Sequence[int], shape: Sequence[int], size: int, device: torch.device) -> None:
    """Forward and backward over samples without numbers, each with a prompt of its own."""
    empty = partial(torch.empty, device=device)
    t, prompts = torch.zeros(size, dtype=torch.int64, device=device), [f"{i} {SLOT}" for i in range(size)]
    batch = Batch(empty(size, *moments), prompts, t, empty(size, *shape), empty(size, *shape))
    concept = SimpleNamespace(placeholder="<word>", vectors=empty(1, model.width, requires_grad=True))
    loss_and_gradient(model, AnyTime(**model.schedule), batch, concept, size)


class AnyTime(Schedule):
    """A schedule for times that have no numbers."""

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Some number for each time, (B,) float64 on the CPU."""
        return torch.ones(len(t), dtype=torch.float64)


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


def _parameters(model: Any) -> list[Tensor]:
    return [p for network in model.networks().values() for p in parameters_of(network)]


def _shell(model: Any) -> Any:
    """A model like another, without its upsampler, with its encoder, on the meta device."""
    networks = {name: on_meta(partial(type(part), part.config)) for name, part in model.networks().items()}
    others = {"upsampler": None, "released": False}
    others = {name: value for name, value in others.items() if getattr(model, name, value) != value}
    return replace(model, **networks, **others)


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
