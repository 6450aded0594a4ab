"""A classifier that reads noise: which class is on a noisy image, told its time.

The way down and the middle of a UNet, then attention pooling: the mean of all positions asks them all what they saw,
and a linear layer turns the answer into a logit a class. Trained on noisy images of all times, so that the gradient
of log p(y | x_t) means something at every step of a chain.

Parameter names are those of openai/guided-diffusion @ 22e0df8, unet.py, EncoderUNetModel.
Source: Dhariwal & Nichol 2021, section 4 and appendix H; attention pooling: Radford et al. 2021 (CLIP), section 2.4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attend import attend, split
from models.class_names import ClassNames
from models.condition import Condition
from models.errors import ModelError
from models.layers import NormSiLU, Pointwise, tokens_of
from models.unet import Descent, UNetConfig


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier in numbers. descent: the way down, whose out_channels are the classes. image_size: in pixels.

    Raises ModelError for a size that the way down cannot halve.
    """

    descent: UNetConfig
    image_size: int

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % self.descent.factor:
            raise ModelError(
                f"a classifier of {self.image_size} pixels cannot halve them: use a multiple of {self.descent.factor}"
            )


class AttentionPool(nn.Module):
    """(B, C, h, w) -> (B, classes): the positions and their mean, of which the mean's answer is read off."""

    def __init__(self, channels: int, positions: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) * channels**-0.5)
        self.qkv_proj = Pointwise(channels, 3 * channels, 1)
        self.c_proj = Pointwise(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens_of(x)                                                                       # (B, N, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.T   # (B, 1 + N, C)
        q, k, v = split(self.qkv_proj(x), self.heads, 3, heads_first=False)                    # (B, 1 + N, H, d) each
        return self.c_proj(attend(q[:, :1], k, v)).squeeze(1)


class Classifier(Descent):
    """Logits of the classes from a noisy image and its time. names: of the classes; None calls them by their numbers.

    Raises ModelError for another number of names.
    """

    def __init__(self, config: ClassifierConfig, names: ClassNames | None = None) -> None:
        super().__init__(config.descent)
        self.names = ClassNames.numbered(self.classes) if names is None else names
        if len(self.names) != self.classes:
            raise ModelError(f"{len(self.names)} names for {self.classes} classes: {self.names}")
        self.image_size, c = config.image_size, self.channels
        positions = (config.image_size // config.descent.factor) ** 2
        pool = AttentionPool(c, positions, config.descent.heads(c), config.descent.out_channels)
        self.out = nn.Sequential(NormSiLU(self.config.norm_groups, c, eps=1e-5), nn.Identity(), pool)

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.config.out_channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) in the network's dtype, of the size that it was built for. t: (B,) times.

        Returns (B, classes) logits in x's dtype. Raises ModelError for images of another size or channel count.
        """
        wanted = (self.config.in_channels, self.image_size, self.image_size)
        if tuple(x.shape[1:]) != wanted:
            raise ModelError(f"this classifier reads images {wanted}, these are {tuple(x.shape[1:])}")
        cond = Condition(self.embedded(t, x.dtype), None)
        for stage in self.input_blocks:
            x = stage(x, cond)
        return self.out(self.middle_block(x, cond))
