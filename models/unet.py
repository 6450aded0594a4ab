"""The UNet: a noisy image down a staircase of resolutions and up again, told the time and the text at every step.

Going down, every level is `num_res_blocks` residual blocks (each followed by attention where the configuration asks
for it), then a halving. Going up there is one residual block more per level, because each block also reads what its
counterpart on the way down left behind. The leaves differ between families: how a text is read (a spatial
transformer or joint attention), how sizes change (a convolution or a residual block that resamples), how the time
enters a block (added, or as a scale and a shift of its norm).

Parameter names are the published ones of CompVis/stable-diffusion @ 21f890f (which took them from
openai/guided-diffusion), so those files load with a prefix cut off and no table.

Source: Ronneberger et al. 2015; Ho et al. 2020, appendix B; Rombach et al. 2022.
"""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.attend import AttentionKind
from models.attention import ImageAttention, JointAttention, SpatialTransformer
from models.checkpointing import Checkpointing
from models.condition import Condition
from models.errors import ModelError
from models.layers import Conv2d, NormSiLU, Upsample, conv3x3, for_each, half, timestep_embedding, twice, zero
from models.residual import Downsample, ResBlock
from models.setting import require_choice
from models.streaming import Window

Attention = Literal["transformer", "joint", "self", "self_legacy"]


@dataclass(frozen=True)
class UNetConfig:
    """A UNet in numbers. Level i works at resolution / 2^i with model_channels * channel_mult[i] channels; the first
    convolution has as many as level 0.

    attention_resolutions: the downsampling factors (1, 2, 4, ...) whose levels have attention; the middle always has.
    num_heads, head_channels: exactly one is given: heads per attention, or channels per head.
    attention: "transformer" (Stable Diffusion; transformer_depth and linear_proj are its own), "joint" (GLIDE), or
    without a text "self" and "self_legacy" (guided-diffusion; see ImageAttention's heads_first).
    resblock_updown: residual blocks resample, not convolutions. scale_shift: the time scales and shifts a norm.
    num_classes: how many have a vector that can be added to the time's, or None.
    norm_groups: of every group norm; 32 in all published networks. Where that leaves a group one channel, the norm
    erases the channel's mean, and the network can say nothing of an image's mean colour.

    Raises ModelError for both or none of num_heads and head_channels, for an attention that there is not, and for a
    level whose channels no head or group divides.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_heads: int | None = 8
    head_channels: int | None = None
    context_dim: int = 768
    transformer_depth: int = 1
    linear_proj: bool = False
    attention: Attention = "transformer"
    resblock_updown: bool = False
    scale_shift: bool = False
    num_classes: int | None = None
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.head_channels is None):
            raise ModelError(
                f"a UNet takes either num_heads or head_channels, not both or neither: got num_heads="
                f"{self.num_heads}, head_channels={self.head_channels}"
            )
        if self.attention not in typing.get_args(Attention):
            raise ModelError(f"no attention is called {self.attention!r}; there are {typing.get_args(Attention)}")
        for channels in self.channels:
            of = {"num_heads": self.num_heads, "head_channels": self.head_channels, "norm_groups": self.norm_groups}
            for what, divisor in of.items():
                if divisor is not None and (divisor < 1 or channels % divisor):
                    raise ModelError(f"a level of a UNet has {channels} channels, no multiple of {divisor} ({what})")

    def heads(self, channels: int) -> int:
        """Number of attention heads at a level of that many channels."""
        return self.num_heads or channels // self.head_channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def factor(self) -> int:
        """How often height and width are halved, as a product: both must be multiples of it."""
        return 2 ** (len(self.channel_mult) - 1)


class Stem(Conv2d):
    """The first convolution; it takes the condition like every other layer and has no use for it."""

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        return super().forward(x)


class Stage(nn.Sequential):
    """Layers in a row, all told the same condition.

    Each sees an alias of its input, which collects the gradients of its uses: they are added in the same order as
    where a window makes a checkpoint of the layer, and are the same to the bit.
    """

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        for layer in self:
            x = layer(x.view_as(x), cond) if cond.window is None else cond.window.run(layer, x, cond)
        return x


class Descent(nn.Module):
    """The way down and the middle, which a UNet and a classifier of noisy images have alike.

    channels: of what comes out of the middle. skips: the channels of what each input block leaves behind.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, emb_dim, c = config.model_channels, 4 * config.model_channels, config.channels[0]
        self.time_embed = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.input_blocks, skips = nn.ModuleList([Stage(Stem(config.in_channels, c, 3, padding=1))]), [c]
        for level, channels in enumerate(config.channels):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._stage(c, channels, level))
                skips.append(c := channels)
            if level != len(config.channels) - 1:
                down = self._block(c, c, half) if config.resblock_updown else Downsample(c)
                self.input_blocks.append(Stage(down))
                skips.append(c)
        self.middle_block = Stage(self._block(c, c), self._attention(c), self._block(c, c))
        self.channels, self.skips = c, skips

    def embedded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Times (B,) -> (B, E)."""
        return self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))

    def _block(self, c_in: int, c_out: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResBlock:
        config = self.config
        return ResBlock(c_in, c_out, 4 * config.model_channels, config.norm_groups, config.scale_shift, resample)

    def _attention(self, c: int) -> SpatialTransformer | JointAttention | ImageAttention:
        config = self.config
        if config.attention in ("self", "self_legacy"):
            return ImageAttention(c, config.heads(c), config.norm_groups, config.attention == "self_legacy")
        if config.attention == "joint":
            return JointAttention(c, config.context_dim, config.heads(c), config.norm_groups)
        return SpatialTransformer(
            c, config.context_dim, config.heads(c), config.norm_groups, config.transformer_depth, config.linear_proj
        )

    def _stage(self, c_in: int, c_out: int, level: int) -> Stage:
        stage = Stage(self._block(c_in, c_out))
        if 2**level in self.config.attention_resolutions:
            stage.append(self._attention(c_out))
        return stage


class UNet(Descent):
    """Predicts eps or v (the caller knows which) from a noisy image, its time, and a text or a class."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        c, skips = self.channels, list(self.skips)
        self.output_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for i in range(config.num_res_blocks + 1):
                stage = self._stage(c + skips.pop(), channels, level)
                c = channels
                if level and i == config.num_res_blocks:
                    stage.append(self._block(c, c, twice) if config.resblock_updown else Upsample(c))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(
            NormSiLU(config.norm_groups, c, eps=1e-5), nn.Identity(), zero(conv3x3(c, config.out_channels))
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, 4 * config.model_channels)

    def layers(self) -> list[nn.Module]:
        """What its stages are made of, in the order in which they run."""
        return [layer for stage in (*self.input_blocks, self.middle_block, *self.output_blocks) for layer in stage]

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, pooled: Tensor | None = None,
        checkpointing: Checkpointing = "none", attention: AttentionKind = "auto", window: Window | None = None,
    ) -> Tensor:  # fmt: skip
        """One look at a noisy image.

        x: (B, in_channels, h, w) in the network's dtype, h and w multiples of `config.factor`.
        t: (B,) times in 0..999, integer or fractional. context: (B, L, context_dim), where the attention reads one.
        pooled: (B, 4 * model_channels), a text (GLIDE) or a class in one vector, added to the time's, or None.
        x and t may be b, for which B = k b texts stand, each told all of them in turn: what comes before the first text
        is read is then computed once.
        checkpointing, attention, window: how, see `Condition`; answers and gradients are the same.
        Returns the raw prediction (B, out_channels, h, w) in x's dtype. Raises ModelError for a choice that is none,
        for other sides, and where B is no multiple of b.
        """
        require_choice("checkpointing", checkpointing, Checkpointing)
        require_choice("attention", attention, AttentionKind)
        if any(side % self.config.factor for side in x.shape[2:]):
            sides, factor = tuple(x.shape[2:]), self.config.factor
            raise ModelError(f"a map of {sides} cannot be halved by this UNet: both sides are multiples of {factor}")
        if pooled is not None:                                                                 # every layer is told
            x, t = for_each(x, pooled), for_each(t, pooled)
        emb = self.embedded(t, x.dtype)                                                        # (B, E)
        cond = Condition(emb if pooled is None else emb + pooled, context, checkpointing, attention, window)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, cond)
            skips.append(x)
        x = self.middle_block(x, cond)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, for_each(skips.pop(), x)], dim=1), cond)
        return self.out(x).contiguous()
