"""How a model is run, as data, and the one function that makes it run so.

The answers and gradients of all settings of one dtype are equal but for rounding.
"""

import typing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.copying import Copier
from models.errors import ModelError
from models.layout import converted
from models.lending import parameters_of
from models.mapped import Mapped, file_maps
from models.offload import Offload, runs_in
from models.streaming import Window
from models.weights import choose_dtype


@dataclass(frozen=True)
class Setting:
    """dtype: of the networks. checkpointing: what is computed again in the backward pass, see `Condition`.
    attention: its kernel, see `attend`. offload: what leaves the device, see `offload`.

    Raises ModelError for a choice that there is not, a dtype that is none, and for "stream" without "blocks": a layer
    whose weights have left the device has to be computed again when its gradient is wanted.
    """

    dtype: torch.dtype
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    offload: Offload = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise ModelError(f"a setting's dtype is one of torch's, such as torch.float32, not {self.dtype!r}")
        choices = {"checkpointing": Checkpointing, "attention": AttentionKind, "offload": Offload}
        for name, choice in choices.items():
            require_choice(name, getattr(self, name), choice)
        if self.offload == "stream" and self.checkpointing != "blocks":
            raise ModelError(
                "offload stream computes every layer again in the backward pass: it needs checkpointing blocks, not "
                f"{self.checkpointing}"
            )

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, checkpointing {self.checkpointing}, attention {self.attention}, offload {self.offload}"

    def cheaper(self) -> "Setting | None":
        """The next setting that needs less memory and has the same results, at the least loss of time."""
        ladder = typing.get_args(Checkpointing)
        if self.checkpointing != ladder[-1]:
            return replace(self, checkpointing=ladder[ladder.index(self.checkpointing) + 1])
        rest = typing.get_args(Offload)[typing.get_args(Offload).index(self.offload) + 1 :]
        return replace(self, offload=rest[0]) if rest else None


def place(
    model: Any, setting: Setting, device: torch.device, copier: Copier | None = None, own_dtypes: bool = False
) -> None:
    """Make a model, and its upsampler, run as a setting says.

    model: of any kind. With an offload its networks lie in host memory, and what does not wait there is put on the
    device in the setting's dtype; without, they stay as they are. copier: see `Window`. own_dtypes: what waits runs in
    the dtype that its file would give it, see `choose_dtype`, and not in the setting's, which is the UNet's.
    """
    layers = model.unet.layers() if setting.offload == "stream" else []
    maps = file_maps() if setting.offload != "none" else []
    waiting = {id(p) for layer in layers for p in parameters_of(layer)}
    for part in model.unet.modules() if setting.offload != "none" else ():
        for name, p in part._parameters.items():
            if p is not None and id(p) not in waiting and (p.device, p.dtype) != (device, setting.dtype):
                here = converted(Mapped(p, maps).anew(), device, setting.dtype)
                part._parameters[name] = nn.Parameter(here, requires_grad=False)
    model.checkpointing, model.attention, model.offload = setting.checkpointing, setting.attention, setting.offload
    model.window = Window(layers, device, setting.dtype, copier) if layers else None
    for network in model.networks().values():
        network.runs_in = None
        if setting.offload != "none":
            network.runs_in = choose_dtype(None, runs_in(network), device) if own_dtypes else setting.dtype
    if model.upsampler is not None:
        its_own = replace(setting, dtype=choose_dtype(None, model.upsampler.dtype, device))
        place(model.upsampler, its_own if own_dtypes else setting, device, copier, own_dtypes)


def require_choice(what: str, value: str, choices: object) -> None:
    """Raise ModelError unless a value is one of a Literal's."""
    if value not in typing.get_args(choices):
        raise ModelError(f"{what} is one of {', '.join(typing.get_args(choices))}; {value!r} is none of them")
