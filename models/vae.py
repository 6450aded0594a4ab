"""The autoencoder that moves diffusion from pixels to latents.

The encoder answers with the *moments* of a diagonal Gaussian over latents; everything random happens outside. The
latent that diffusion sees is scaled to about unit variance, and that factor lives here and nowhere else:

    x0 = scale * (mean + exp(logvar / 2) * noise),        image = decode(x0 / scale)

Parameter names are those of CompVis/stable-diffusion @ 21f890f (`first_stage_model.` cut off).
Source: Kingma & Welling 2013; Esser et al. 2021; Rombach et al. 2022.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import heap
from models.attend import attend, by_head
from models.bands import is_large
from models.layers import (
    Conv2d,
    GroupNorm,
    NormSiLU,
    Upsample,
    conv3x3,
    fresh,
    map_of,
    norm_conv,
    plus,
    plus_conv,
    tokens_of,
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder in numbers. Level i has channels * channel_mult[i] channels; all but the last end in a halving.

    scale: what a sampled latent is multiplied by to reach unit variance (0.18215 for Stable Diffusion).
    norm_groups: groups of every group norm. Where that is one channel a group, a norm erases the channel's mean, and
    with it the picture's colours: a narrow autoencoder wants fewer groups.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale: float = 0.18215
    norm_groups: int = 32

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut. (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(groups, c_in, eps=1e-6), conv3x3(c_in, c_out)
        self.norm2, self.conv2 = NormSiLU(groups, c_out, eps=1e-6), conv3x3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_conv(self.norm1, self.conv1, x)
        h = norm_conv(self.norm2, self.conv2, h, in_place=True)
        if not hasattr(self, "nin_shortcut"):
            return plus(h, x)
        return plus_conv(h, self.nin_shortcut, x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, with 1x1 convolutions for its projections. (B, C, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (by_head(tokens_of(layer(y)), 1) for layer in (self.q, self.k, self.v))      # (B, h*w, 1, C)
        return plus(fresh(self.proj_out, map_of(attend(q, k, v), x.shape[2])), x)


class Downsample(nn.Module):
    """Halving by a strided convolution, padded on the right and at the bottom: (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks at one resolution, and perhaps a change of resolution after them.

    Whoever iterates over them lets each map go as soon as the next is there.
    """

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.block
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                yield getattr(self, resample)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B, 3, H, W) images -> (B, 2 * latent_channels, H/f, W/f)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, top = config.channels, len(config.channel_mult) - 1
        self.conv_in = conv3x3(config.in_channels, c)
        self.down = nn.ModuleList()
        for i, mult in enumerate(config.channel_mult):
            level = Level(c, c := mult * config.channels, config.num_res_blocks, config.norm_groups)
            if i != top:
                level.downsample = Downsample(c)
            self.down.append(level)
        self.mid = Middle(c, config.norm_groups)
        self.norm_out = NormSiLU(config.norm_groups, c, eps=1e-6)
        self.conv_out = conv3x3(c, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for layer in level:
                h = layer(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, h*f, w*f); one residual block more a level than the encoder."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config.channels * config.channel_mult[-1]
        self.conv_in = conv3x3(config.latent_channels, c)
        self.mid = Middle(c, config.norm_groups)
        levels = []
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            level = Level(c, c := mult * config.channels, config.num_res_blocks + 1, config.norm_groups)
            if i:
                level.upsample = Upsample(c)
            levels.insert(0, level)                                     # up.0 is the finest, as in the encoder
        self.up = nn.ModuleList(levels)
        self.norm_out = NormSiLU(config.norm_groups, c, eps=1e-6)
        self.conv_out = conv3x3(c, config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            if is_large(h) and not torch.compiler.is_compiling():
                heap.give_back()
            for layer in level:
                h = layer(h)
        return norm_conv(self.norm_out, self.conv_out, h)


class VAE(nn.Module):
    """Images in [-1, 1] to moments of their latents, and scaled latents back to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = Conv2d(2 * c, 2 * c, 1), Conv2d(c, c, 1)

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return self.config.factor

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides multiples of `factor` -> moments (B, 2C, H/f, W/f): mean, log-variance."""
        return self.quant_conv(self.encoder(images))

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The latent that diffusion works on: moments (B, 2C, h, w), noise (B, C, h, w) ~ N(0, 1) -> x0 (B, C, h, w).

        The log-variance is clamped to [-30, 20] (CompVis/stable-diffusion @ 21f890f, DiagonalGaussianDistribution).
        """
        mean, logvar = moments.chunk(2, dim=1)
        return self.config.scale * (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise)

    def decode(self, x0: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, h*f, w*f), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(x0 / self.config.scale))
