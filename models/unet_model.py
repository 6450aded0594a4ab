"""What every model here has alike: a UNet, the way in which it is run, and how its images are usually drawn."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.errors import ModelError
from models.offload import Offload
from models.setting import Setting
from models.streaming import Window
from models.text import TextFeatures
from models.unet import UNet

PREDICTIONS = ("epsilon", "v_prediction")


class Sampling(NamedTuple):
    """How a model's images are usually drawn: a name of `diffusion.SAMPLERS`, its steps, the guidance scale.

    steps: how many, or a spacing of `diffusion.respaced`. noise: the factor on the first x.
    """

    sampler: str
    steps: int | str
    scale: float
    noise: float = 1.0


class UNetModel:
    """Base of the models. unet: its network. source: where it is from. prediction: one of PREDICTIONS.

    checkpointing, attention: how the UNet runs, see `Condition`; answers are the same. offload, window:
    what waits in host memory while it does not compute, as `models.load` placed it. upsampler: another model, which
    enlarges what this one draws, or None. released: its VAE has left for good.
    """

    unet: UNet
    source: str
    prediction: str
    checkpointing: Checkpointing
    attention: AttentionKind
    offload: Offload
    window: Window | None
    upsampler: Any
    released: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the UNet runs in."""
        return next(self.unet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that the UNet is on."""
        return next(self.unet.parameters()).device

    @property
    def setting(self) -> Setting:
        """How it is run."""
        return Setting(self.dtype, self.checkpointing, self.attention, self.offload)

    def to(self, device: torch.device | str) -> Any:
        """Move all networks, an upsampler's too, to a device. Returns itself.

        Raises ModelError for a model with offload, whose networks have their places.
        """
        if self.offload != "none":
            raise ModelError(
                f"{self.source} was loaded with offload {self.offload} for {self.device}: load it anew for another"
            )
        for part in (*self.networks().values(), self.upsampler):
            if part is not None:
                part.to(device)
        return self

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by their names; not a VAE that was let go."""
        gone = {"vae"} if self.released else set()
        return {name: part for name, part in vars(self).items() if isinstance(part, nn.Module) and name not in gone}

    def answer(self, x: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """The UNet's raw answer to all of its input channels x (B, in_channels, h, w), in at least float32.

        Raises ModelError unless there is a time an image: fewer would be told in turn, as fewer images are.
        """
        if not isinstance(t, Tensor) or t.shape != x.shape[:1]:
            found = f"a tensor {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ModelError(f"times are a tensor ({len(x)},), one an image, not {found}")
        context, pooled = (None if feature is None else feature.to(self.dtype) for feature in features)
        how = {"checkpointing": self.checkpointing, "attention": self.attention, "window": self.window}
        return at_least_float32(self.unet(x.to(self.dtype), t.to(x.device), context, pooled, **how))

    def require_size(self, height: int, width: int, multiple: int) -> None:
        """Raise ModelError for an image whose sides, in pixels, are no multiples: it cannot be halved often enough."""
        if height < 1 or width < 1 or height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
            raise ModelError(
                f"an image of {width}x{height} pixels cannot be halved by this model: "
                f"both sides must be multiples of {multiple}, {near[0]}x{near[1]} for example"
            )

    def require_fit(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Raise ModelError for two numbers that differ, each pair under what it is, and for an unknown prediction."""
        for what, (first, second) in pairs.items():
            if first != second:
                raise ModelError(f"{self.source}: {what} differ, {first} and {second}")
        if self.prediction not in PREDICTIONS:
            raise ModelError(f"{self.source} predicts {self.prediction!r}; known are {', '.join(PREDICTIONS)}")


def require_floats(images: Tensor) -> None:
    """Raise ModelError for images of whole numbers, whose 0 … 255 would be taken for -1 … 1."""
    if not images.is_floating_point():
        raise ModelError(f"images are floats in [-1, 1], not {images.dtype}: of bytes, images / 127.5 - 1")


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
