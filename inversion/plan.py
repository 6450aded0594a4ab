"""Does it fit? What a training would take in each setting, before anything is loaded or any device is there.

The step that would be trained with runs on tensors that have sizes and no numbers (`stand_in`): an image through the
encoder, prompts through the text transformer, the UNet, the loss, and back to the vectors. `memory` follows what lives
meanwhile and counts what is computed. What is predicted is all that torch allocates on the device, weights included;
not the driver's own memory (a CUDA context takes 0.3 to 0.5 GiB), nor the program's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion import Schedule
from inversion.choice import Planned, settings_for
from inversion.config import MOST
from inversion.errors import InversionError
from inversion.memory import LiveMemory
from inversion.objective import Batch, loss_and_gradient
from inversion.prompts import SLOT
from inversion.stand_in import as_on, every_parameter, fake_device, placed, without_weights
from models import ModelError, Setting, outline
from models.devices import choose_device

CUBLAS = 8_519_680      # bytes that its workspace takes (CUDA's documentation, cublasSetWorkspace: 2 x 4 MiB and more)
HEAP = 64 * 2**20       # freed bytes that a CPU's heap may keep (glibc, mallopt(3): M_TRIM_THRESHOLD, twice 32 MiB)
LARGEST = 4096          # pixels a side: of many more, the slices of attention take minutes to follow


def plan(
    model: Any, resolution: int | None = None, batch_size: int = 1, device: torch.device | str = "cuda",
    settings: Iterable[Setting] | None = None,
) -> list[Planned]:  # fmt: skip
    """What a training would take: one entry a setting, in the settings' order.

    model: a model, or what `models.load` takes; weights need not be there. It is planned as its configuration tells:
    layers of one's own are not counted. resolution: side of the images in pixels, None for the model's own.
    batch_size: samples through the network at once. device: need not be there. settings: None for all that make sense
    on the device, see `settings_for`.

    Raises ModelError for a source that nothing is known of, a model that reads no text, a resolution that the model
    cannot halve, a device other than a CPU or CUDA's, and float16 on a CPU; InversionError for a batch of none and for
    images of more than `LARGEST` a side, and batches of more than `MOST`.
    """
    return list(one_by_one(model, resolution, batch_size, device, settings))


@torch.inference_mode(False)
def one_by_one(
    model: Any, resolution: int | None, batch_size: int, device: torch.device | str, settings: Iterable[Setting] | None
) -> Iterator[Planned]:
    """The entries of `plan`, each planned when it is asked for; arguments and errors as there."""
    shell, device, side = _asked(model, device, resolution, batch_size)
    wanted = settings_for(device) if settings is None else settings
    listed = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    if isinstance(wanted, Setting) or not all(isinstance(each, Setting) for each in listed):
        raise InversionError(f"settings are a list of models.Setting, not {wanted!r}")
    encoding = cache(partial(_encoding, shell, device, side))
    for setting in listed:
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
    shape, (where, fake, memory) = shell.x0_shape(side, side), fake_device(device)
    with fake, as_on(device, memory):
        model, _ = placed(shell, setting, where, memory)
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
    if not isinstance(model, str | Path) and not hasattr(model, "networks"):
        raise ModelError(f"a plan is of a model, or of what models.load takes, not of {model!r}")
    shell = without_weights(outline(model) if isinstance(model, str | Path) else model)
    if not shell.width:
        raise ModelError(f"{shell.source} is told classes: it reads no text, and so no word can be taught to it")
    side = shell.resolution if resolution is None else resolution
    for name, number in (("batch_size", batch_size), ("resolution", side)):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise InversionError(f"{name} must be a whole number, not {number!r}")
    if batch_size < 1:
        raise InversionError(f"batch_size must be at least 1, not {batch_size}")
    if batch_size > MOST:
        raise InversionError(f"plans are made for batches of up to {MOST}, not of {batch_size}")
    if side > LARGEST:
        raise InversionError(f"plans are made for images of up to {LARGEST} pixels a side, not of {side}")
    shell.x0_shape(side, side)
    return shell, device, side


def _encodes(setting: Setting) -> Setting:
    """What of a setting matters when an image is encoded, once before all steps."""
    return Setting(setting.dtype, "blocks", offload=setting.offload)


def _encoding(shell: Any, device: torch.device, side: int, setting: Setting) -> tuple[tuple[int, ...], int]:
    """The shape of an image's moments, and the peak of encoding it."""
    where, fake, memory = fake_device(device)
    with fake, as_on(device, memory):
        model, _ = placed(shell, setting, where, memory)
        with memory:
            moments = model.moments(torch.empty(1, 3, side, side, device=where))
    return moments.shape[1:], _in_all(memory, device)


def _predicted(
    shell: Any, setting: Setting, device: torch.device, side: int, batch_size: int, moments: Sequence[int], least: int
) -> Planned:
    """What a step takes, its encoder let go, and computes. moments: of an image; least: the peak of encoding it."""
    where, fake, memory = fake_device(device)
    released = replace(shell)
    released.release_encoder()
    with fake, as_on(device, memory):
        model, waiting = placed(released, setting, where, memory)
        with memory:
            _step(model, moments, model.x0_shape(side, side), batch_size, where)
    moved = 2 * sum(p.nbytes for p in every_parameter(model) if id(p) in waiting)        # forward, and backward again
    return Planned(setting, max(least, _in_all(memory, device)), memory.flops, moved)


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
