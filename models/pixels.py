"""What models of pixels have alike: an image is its own x_0, and other images may stand beside the noisy one.

An upsampler is shown a small image, an inpainting network the part that it is to keep; both come in further input
channels. What a network is told besides, a text or a class, is its own model's affair.

Source: Nichol et al. 2022 (GLIDE); Dhariwal & Nichol 2021 (upsampling).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.text import TextFeatures
from models.unet_model import UNetModel, at_least_float32, require_floats


def beside(size: tuple[int, int], low_res: Tensor | None, image: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """What the input channels hold beside the noisy image, in their order.

    size: (H, W) of the noisy image. image (B, 3, H, W) in [-1, 1] and mask (B, 1, H, W), 1 where it is to be kept:
    for inpainting networks. low_res: (B, 3, h, w) in [-1, 1], for upsamplers, enlarged bilinearly.
    """
    known = [] if image is None else [image * mask, mask]
    small = [] if low_res is None else [F.interpolate(low_res, size, mode="bilinear", align_corners=False)]
    return known + small


class PixelModel(UNetModel):
    """Base of the models that draw pixels.

    factor: how many times larger its images are than the small ones that it is shown; 1 if it is shown none.
    inpaints: it keeps a part of an image.
    """

    pixels: ClassVar[bool] = True
    factor: int
    inpaints: bool

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """The UNet's raw answer (B, 3 or 6, H, W), float32: eps, then perhaps where the variance lies, in [-1, 1].

        x_t: (B, 3, H, W) at times t (B,). An inpainting network keeps nothing, see `given`. Raises ModelError for an
        upsampler, which has nothing to enlarge.
        """
        if self.factor > 1:
            raise ModelError(f"{self.source} enlarges images: `given` a small one it predicts, by itself it cannot")
        nothing = [x_t.new_zeros(len(x_t), 4, *x_t.shape[2:])] if self.inpaints else []
        return self.answer(torch.cat([x_t, *nothing], dim=1), t, features)

    def given(
        self, size: tuple[int, int], small: Tensor | None, image: Tensor | None, mask: Tensor | None
    ) -> "GivenImages":
        """This model with images in its further input channels; the arguments are those of `beside`.

        An inpainting network that is given no image keeps nothing. Raises ModelError for a small image that is not
        `factor` times smaller.
        """
        small = None if small is None else ((small + 1) * 127.5).round() / 127.5 - 1           # as 8-bit pixels
        if small is not None and tuple(self.factor * side for side in small.shape[2:]) != tuple(size):
            raise ModelError(
                f"{self.source} enlarges {self.factor} times: a small image of {small.shape[3]}x{small.shape[2]} "
                f"pixels is not that of {size[1]}x{size[0]}"
            )
        if self.inpaints and image is None and small is not None:
            image, mask = (small.new_zeros(len(small), channels, *size) for channels in (3, 1))
        return GivenImages(self, torch.cat(beside(size, small, image, mask), dim=1))

    def upsampler_pairs(self) -> dict[str, tuple[int, int]]:
        """What an upsampler has to have in common with this model, for `require_fit`; nothing without one.

        Raises ModelError unless that is a model of this kind which enlarges, and this one is a base.
        """
        other = self.upsampler
        if other is None:
            return {}
        if not isinstance(other, type(self)) or other.factor == 1 or self.factor > 1:
            raise ModelError(
                f"{self.source}: the upsampler of a base model is one of its kind that enlarges, and {other.source} "
                f"does not enlarge what {self.source} draws"
            )
        return {
            "whether this one and its upsampler are for inpainting": (self.inpaints, other.inpaints),
            "the upsampler's resolution and what it should make of this model's": (
                other.resolution, other.factor * self.resolution,
            ),
        }  # fmt: skip

    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], which are their own x_0. Raises ModelError for whole numbers."""
        require_floats(images)
        return at_least_float32(images)

    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The images themselves: there is nothing to draw."""
        return moments

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 (B, 3, H, W) -> images, float32, clamped to [-1, 1]."""
        return at_least_float32(x0).clamp(-1.0, 1.0)

    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(3, H, W). Raises ModelError for a size that the network cannot halve."""
        self.require_size(height, width, self.unet.config.factor)
        return 3, height, width

    def release_encoder(self) -> None:
        """Nothing: there is no encoder."""


@dataclass(frozen=True)
class GivenImages:
    """A network with images beside the noisy one. images: (b, c, H, W), for every run of b noisy images."""

    model: PixelModel
    images: Tensor

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.model.prediction

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """As `PixelModel.predict`; x_t: (k * b, 3, H, W)."""
        images = self.images.to(x_t).repeat(len(x_t) // len(self.images), 1, 1, 1)
        return self.model.answer(torch.cat([x_t, images], dim=1), t, features)
