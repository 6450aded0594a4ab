"""The small parts that every network here is made of.

Normalisation computes its statistics in float32 whatever dtype comes in (torch's kernels do so inside), and every
epsilon is written out: the published networks use 1e-5 in UNet residual blocks and 1e-6 in spatial transformers and
the VAE, and the wrong one shows as soon as activations are small.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from models import bands, doubled, frozen, fused_linear, products
from models.checkpointing import goes_forward, records
from models.condition import Condition
from models.errors import ModelError
from models.group_norm import frozen_group_norm

AS_WRITTEN: dict[type, Callable[..., Any]] = {nn.LayerNorm: nn.LayerNorm.forward}
TORCH_CONV = nn.modules.conv.__file__       # what was patched before this was imported is none of torch's, either


def as_written(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers, whose forward is noted: put in another's place later it will be called, see `heard`."""
    AS_WRITTEN[kind] = kind.forward
    return kind


@as_written
class Conv2d(nn.Conv2d):
    """A convolution of which, with frozen weights, nothing is kept for the backward pass.

    One that is made otherwise than those here, to pad in a circle for example, is torch's.
    """

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, C_in, h, w)
        if trains(self) or not usual(self):
            return super().forward(x)
        return frozen.conv2d(x, self.weight, self.bias, self.stride, self.padding)


@as_written
class Linear(nn.Linear):
    """A linear layer (…, C_in) -> (…, C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        if trains(self):
            return super().forward(x)
        return linear(x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """A group norm of which, with frozen weights, the input is kept for the backward pass. (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        if trains(self):
            return super().forward(for_torch(x))
        return frozen_group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


@as_written
class NormSiLU(nn.GroupNorm):
    """A group norm, perhaps scaled by 1 + scale and shifted, (B, C, 1, 1) each; then SiLU: as one operation."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if trains(self):
            y = super().forward(for_torch(x))
            return F.silu(y if scale is None else y * (1 + scale) + shift)
        return frozen_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, True, scale, shift)


@as_written
class Pointwise(nn.Conv1d):
    """A linear layer of tokens (B, N, C_in) whose weight, (C_out, C_in, 1), is stored as that of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if trains(self):
            return F.linear(x, self.weight.squeeze(2), self.bias)
        return linear(x, self.weight.squeeze(2), self.bias)


def for_torch(x: Tensor) -> Tensor:
    """A map as torch's group norm can read it: its forward derivative, before 2.14, only of contiguous ones."""
    return x.contiguous() if goes_forward() else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of frozen weights, by the library that is the faster."""
    if not products.onednn_is_faster(x):
        return F.linear(x, weight, bias)
    return products.frozen_product(x, weight, bias)


def norm_conv(norm: NormSiLU, conv: Conv2d, x: Tensor, in_place: bool = False) -> Tensor:
    """conv(norm(x)), of a 3x3 convolution. in_place: nobody needs x any more, which has the shape of the answer."""
    if not (goes_in_bands(conv, x) and plain(norm)):
        return fresh(conv, norm(x))
    affine, kernel = (norm.weight, norm.bias), (conv.weight, conv.bias)
    return bands.norm_silu_conv(x, affine, norm.num_groups, norm.eps, kernel, in_place)


def plus_conv(h: Tensor, conv: Conv2d, x: Tensor) -> Tensor:
    """h + conv(x), of a 1x1 convolution, perhaps in the memory of h, which nobody else may read."""
    if goes_in_bands(conv, x):
        return bands.plus_pointwise(h, x, conv.weight, conv.bias)
    sides = tokens_of(h), tokens_of(x)
    if plain(conv) and fused_linear.is_worth_it(x) and all(side.is_contiguous() for side in sides):
        return map_of(plus_linear(sides[0], conv, sides[1]), x.shape[2])
    return plus(h, conv(x))


def plus_linear(h: Tensor, layer: Linear | Conv2d, x: Tensor) -> Tensor:
    """h + layer(x), of tokens; a 1x1 convolution only where `fused_linear` says so."""
    if plain(layer) and fused_linear.is_worth_it(x):
        return fused_linear.linear_plus(h, x, layer.weight.flatten(1), layer.bias)
    return plus(fresh(layer, x), h)


def conv_plus(conv: Conv2d, x: Tensor, emb: Tensor) -> Tensor:
    """conv(x) + emb. x: (k b, C_in, h, w); emb: (b, C, 1, 1), k times over. One emb for all images, which needs no
    gradient, is added to the bias.
    """
    if len(emb) != 1 or records() or not plain(conv):
        return plus(fresh(conv, x), for_each(emb, x))
    return frozen.conv2d(x, conv.weight, conv.bias + emb.flatten(), conv.stride, conv.padding)


def conv_of_doubled(conv: Conv2d, x: Tensor) -> Tensor:
    """conv(twice(x)), of a 3x3 convolution."""
    if goes_in_bands(conv, x):
        return bands.doubled_conv(x, conv.weight, conv.bias)
    if plain(conv) and not trains(conv) and doubled.is_worth_it(x, conv.weight):
        return doubled.doubled_conv(x, conv.weight, conv.bias)
    return fresh(conv, twice(x))


def goes_in_bands(conv: Conv2d, x: Tensor) -> bool:
    """Whether a layer is asked for a large map where no gradient is wanted."""
    return bands.is_large(x) and plain(conv) and not records()


def heard(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward, as that is written: it has hooks, or a forward
    of its own, or its class has another one by now.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    forward = getattr(type(module), "forward", None)
    patched = "forward" in vars(module) or AS_WRITTEN.get(type(module), forward) is not forward
    return patched or any(hooks) or _has_any_global_hook()


def plain(layer: nn.Module) -> bool:
    """Whether the layer is one of those here and nothing more, so that its weights may be used without calling it.

    Not one that is wrapped or derived (a LoRA), one without a bias, nor one that is heard: it has to be called.
    """
    if type(layer) not in (Conv2d, Linear, Pointwise, NormSiLU, nn.LayerNorm) or heard(layer):
        return False
    return layer.bias is not None and (type(layer) is not Conv2d or usual(layer))


def usual(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads with zeros, skips no pixel, sees all channels, and is made as torch makes it."""
    if getattr(getattr(conv._conv_forward, "__code__", None), "co_filename", None) != TORCH_CONV:
        return False
    with_zeros = conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
    return with_zeros and (*conv.dilation, conv.groups) == (1, 1, 1)


def fresh(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), into which may be written: a copy, where a hook or somebody's own layer may have kept it."""
    return layer(x) if plain(layer) else layer(x).clone()


def trains(layer: nn.Module) -> bool:
    """Whether the layer's weights learn, or are made of what may (a parametrization, a network of weights): then it
    does what autograd itself would. What is made asks for no gradient in a checkpoint's first run, but in the second,
    so that it is not asked.
    """
    own = layer._parameters
    if not ("weight" in own and "bias" in own):
        return True
    return any(weight is not None and weight.requires_grad for weight in (own["weight"], own["bias"]))


def plus(branch: Tensor, x: Tensor) -> Tensor:
    """branch + x, in the memory of the branch, which nobody else may read.

    (Not where the branch is a view and autograd records: it would copy the whole in the backward pass, three times.)
    """
    recorded_view = branch._is_view() and branch.requires_grad
    return branch + x if recorded_view or branch.dtype != x.dtype else branch.add_(x)


def for_each(x: Tensor, told: Tensor) -> Tensor:
    """x (b, …), repeated as a whole to the length of what it is told, (k b, …): (k b, …).

    Raises ModelError unless that is a multiple of b.
    """
    if len(x) == len(told):
        return x
    if not len(x) or len(told) % len(x):
        raise ModelError(f"{len(x)} images for {len(told)} texts: give as many, or fewer that are told several each")
    return torch.cat([x] * (len(told) // len(x)))


def tokens_of(x: Tensor) -> Tensor:
    """The positions of a map as tokens, (B, C, h, w) -> (B, h*w, C): of a channels-last map the same memory."""
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, height: int) -> Tensor:
    """Back again, (B, h*w, C) -> (B, C, h, w), channels-last."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the time: cosines first, then sines, frequencies 10000^(-i/half).

    t: (B,) times, integer or fractional, on the scale of the original process (0..999).
    Returns (B, channels) float32; an odd channel is zero.
    Source: openai/guided-diffusion @ 22e0df8, nn.py (the transformer's encoding with another order and divisor).
    """
    half = channels // 2
    freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * freqs                                                        # (B, half)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(emb, (0, channels % 2))                                                       # (B, channels)


def zero(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the branch it ends starts as silence. Returns the layer."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> Conv2d:
    """A 3x3 convolution that keeps the size (stride 1) or halves it (stride 2)."""
    return Conv2d(c_in, c_out, 3, stride=stride, padding=1)


def twice(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling. (B, C, h, w) -> (B, C, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def half(x: Tensor) -> Tensor:
    """The mean of each 2x2 square. (B, C, h, w) -> (B, C, h/2, w/2)."""
    return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution. (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        return conv_of_doubled(self.conv, x)
