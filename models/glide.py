"""GLIDE as its users hold it: text in, raw predictions over pixels, images out.

Four networks were published: a base model for 64 pixels, an upsampler from there to 256, and an inpainting form of
each. All are one UNet with one text transformer of its own; they differ in size and in what stands beside the noisy
image in the input channels.

Source: Nichol et al. 2022 (GLIDE); openai/glide-text2im @ 69b5307, text2im_model.py and model_creation.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.errors import ModelError
from models.glide_text import GlideText
from models.glide_tokenizer import GlideTokenizer
from models.latent import Sampling, at_least_float32
from models.offload import Offload, require_no_offload, visit
from models.setting import Setting
from models.streaming import Window
from models.text import TextFeatures
from models.tokenizer import Tokens
from models.unet import UNet


def beside(size: tuple[int, int], low_res: Tensor | None, image: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """What the input channels hold beside the noisy image, in their order.

    size: (H, W) of the noisy image. image (B, 3, H, W) in [-1, 1] and mask (B, 1, H, W), 1 where it is to be kept:
    for inpainting networks. low_res: (B, 3, h, w) in [-1, 1], for upsamplers, enlarged bilinearly.
    """
    known = [] if image is None else [image * mask, mask]
    small = [] if low_res is None else [F.interpolate(low_res, size, mode="bilinear", align_corners=False)]
    return known + small


@dataclass
class GlideModel:
    """One of GLIDE's networks with its text transformer, and what is needed to use it.

    schedule: keyword arguments of diffusion.Schedule. resolution: side of the images that it was trained on.
    factor: how many times larger its images are than the small ones that it is shown; 1 if it is shown none.
    inpaints: it keeps a part of an image. source: where it is from. upsampler: what enlarges this one's images, if
    anything does. checkpointing, attention: how this one's UNet runs, see models.layers.Condition; answers are the
    same. offload, window: what waits in host memory while it does not compute, as `models.load` placed it.

    Raises ModelError for parts that do not fit each other.
    """

    unet: UNet
    text: GlideText
    tokenizer: GlideTokenizer
    schedule: dict[str, Any]
    resolution: int
    factor: int
    inpaints: bool
    source: str
    prediction: str = "epsilon"
    upsampler: "GlideModel | None" = None
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    offload: Offload = "none"
    window: Window | None = None
    pixels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        unet, text = self.unet.config, self.text.config
        pairs = {
            "the UNet's output channels and twice an image's": (unet.out_channels, 6),
            "the UNet's input channels and what stands in them": (
                unet.in_channels, 3 + 3 * (self.factor > 1) + 4 * self.inpaints,
            ),
            "the UNet's context and the text's width": (unet.context_dim, text.width),
            "the UNet's time embedding and the pooled text": (4 * unet.model_channels, text.pooled_dim),
            "the tokenizer's vocabulary and the text's": (self.tokenizer.vocab_size, text.vocab_size),
            "the tokenizer's length and the text's": (self.tokenizer.length, text.length),
        }  # fmt: skip
        if self.upsampler is not None:
            pairs["the upsampler's resolution and what it should make of this model's"] = (
                self.upsampler.resolution, self.upsampler.factor * self.resolution,
            )  # fmt: skip
        for what, (first, second) in pairs.items():
            if first != second:
                raise ModelError(f"{self.source}: {what} differ, {first} and {second}")

    @property
    def family(self) -> str:
        """ "glide", the embedded model's "emoji-glide", or "custom-glide": the text transformer's width tells."""
        return {512: "glide", 160: "emoji-glide"}.get(self.width, "custom-glide")

    @property
    def sampling(self) -> Sampling:
        """What suits it when images are drawn: the numbers of OpenAI's notebooks."""
        return Sampling("ddim", "fast27", 1.0, noise=0.997) if self.factor > 1 else Sampling("ddpm", "100", 3.0)

    @property
    def width(self) -> int:
        """D, the size of a token's vector."""
        return self.text.config.width

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks run in."""
        return next(self.unet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that the networks are on."""
        return next(self.unet.parameters()).device

    @property
    def setting(self) -> Setting:
        """How it is run."""
        return Setting(self.dtype, self.checkpointing, self.attention, self.offload)

    def to(self, device: torch.device | str) -> "GlideModel":
        """Move the networks, and the upsampler's, to a device. Returns itself.

        Raises ModelError for a model with offload, whose networks have their places.
        """
        require_no_offload(self)
        for part in (self.unet, self.text, self.upsampler):
            if part is not None:
                part.to(device)
        return self

    def embedding(self, token: int) -> Tensor:
        """(D,) float32: the vector of an existing token, a copy."""
        return self.text.token_embedding.weight[token].detach().float().clone()

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        """Features of tokenised prompts: context (B, L, D) and pooled (B, E), in the network's dtype.

        extra: (n, D) float32, the vectors for ids from vocab_size on; gradients reach them.
        """
        extra = None if extra is None else extra.to(self.device)
        return TextFeatures(*visit(self, self.text, tokens.ids.to(self.device), tokens.mask.to(self.device), extra))

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """The UNet's raw answer (B, 6, H, W), float32: eps, then where the variance lies, in [-1, 1].

        x_t: (B, 3, H, W) at times t (B,). An inpainting network keeps nothing, see `given`. Raises ModelError for an
        upsampler, which has nothing to enlarge.
        """
        if self.factor > 1:
            raise ModelError(f"{self.source} enlarges images: `given` a small one it predicts, by itself it cannot")
        nothing = [x_t.new_zeros(len(x_t), 4, *x_t.shape[2:])] if self.inpaints else []
        return self._predict(torch.cat([x_t, *nothing], dim=1), t, features)

    def given(
        self, size: tuple[int, int], small: Tensor | None, image: Tensor | None, mask: Tensor | None
    ) -> "GivenImages":
        """This model with images in its further input channels; the arguments are those of `beside`.

        Raises ModelError for a small image that is not `factor` times smaller.
        """
        small = None if small is None else ((small + 1) * 127.5).round() / 127.5 - 1           # as 8-bit pixels
        if small is not None and tuple(self.factor * side for side in small.shape[2:]) != tuple(size):
            raise ModelError(
                f"{self.source} enlarges {self.factor} times: a small image of {small.shape[3]}x{small.shape[2]} "
                f"pixels is not that of {size[1]}x{size[0]}"
            )
        return GivenImages(self, torch.cat(beside(size, small, image, mask), dim=1))

    def _predict(self, channels: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        context, pooled = (feature.to(self.dtype) for feature in features)
        t, channels = t.to(channels.device), channels.to(self.dtype)
        how = {"checkpointing": self.checkpointing, "attention": self.attention, "window": self.window}
        return at_least_float32(self.unet(channels, t, context, pooled, **how))

    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], which are their own x_0."""
        return at_least_float32(images)

    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The images themselves: there is nothing to draw."""
        return moments

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 (B, 3, H, W) -> images, float32, clamped to [-1, 1]."""
        return at_least_float32(x0).clamp(-1.0, 1.0)

    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(3, H, W). Raises ModelError for a size that the network cannot halve."""
        multiple = self.unet.config.factor
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ModelError(
                f"an image of {width}x{height} pixels cannot be halved by this model: both sides must be multiples of "
                f"{multiple}"
            )
        return 3, height, width

    def release_encoder(self) -> None:
        """Nothing: there is no encoder."""


@dataclass(frozen=True)
class GivenImages:
    """A GLIDE network with images beside the noisy one. images: (b, c, H, W), for every run of b noisy images."""

    model: GlideModel
    images: Tensor

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.model.prediction

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """As `GlideModel.predict`; x_t: (k * b, 3, H, W)."""
        images = self.images.to(x_t).repeat(len(x_t) // len(self.images), 1, 1, 1)
        return self.model._predict(torch.cat([x_t, images], dim=1), t, features)
