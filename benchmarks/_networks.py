"""Stable Diffusion's networks with random weights, ours and diffusers', built in a few seconds.

Both follow from one of `models.presets`; diffusers' configurations are those that `models.save` would write.
"""

from typing import Any, NamedTuple

import torch
from _process import Work
from torch import nn

from models import ClipTokenizer, LatentModel
from models.configs import write_text, write_unet, write_vae
from models.layout import converted
from models.presets import SD1, Preset, untrained

BLOCK = 2**20


class Peer(NamedTuple):
    """diffusers' UNet2DConditionModel and AutoencoderKL, transformers' CLIPTextModel; the tokenizer is ours."""

    unet: nn.Module
    vae: nn.Module
    text: nn.Module
    tokenizer: ClipTokenizer


def ours(work: Work, preset: Preset = SD1) -> LatentModel:
    """A model of this project in the dtype of the work, on the CPU, frozen."""
    with torch.device("meta"):
        model = untrained(preset)
    dtype = getattr(torch, work.dtype)
    for network in (model.unet, model.vae, model.text):
        fill(network, dtype)
        if dtype != torch.float32:
            as_converted(network)
    return model


def as_converted(network: nn.Module) -> None:
    """Let kernels lie as `models.load` leaves them when it converts a file in float32."""
    for parameter in network.parameters():
        parameter.data = converted(parameter.data.float(), torch.device("cpu"), parameter.dtype)


def peer(work: Work, preset: Preset = SD1, text_dtype: torch.dtype | None = None, words: int = 0) -> Peer:
    """The same networks in diffusers and transformers, frozen.

    text_dtype: of the text transformer, if it is another. words: how many more tokens its table has.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    dtype, side = getattr(torch, work.dtype), preset.resolution // 2 ** (len(preset.vae.channel_mult) - 1)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(write_unet(preset.unet, side))
        vae = AutoencoderKL.from_config(write_vae(preset.vae, preset.resolution))
        tokenizer = untrained(preset).tokenizer
    described = write_text(preset.text, *tokenizer.encode([""]).ids[0, :2].tolist(), preset.pad or 0)
    text = CLIPTextModel(CLIPTextConfig(**described | {"vocab_size": preset.text.vocab_size + words}))
    return Peer(fill(unet, dtype), fill(vae, dtype), fill(text, text_dtype or dtype), tokenizer)


def fill(network: nn.Module, dtype: torch.dtype) -> Any:
    """Give a network, on the CPU or the meta device, random weights that keep activations near 1, and freeze it.

    A matrix is normal with the inverse of its fan-in for a variance: a block of numbers over and over, since drawing a
    billion takes longer than most of what is measured. A norm's scale is 1, a bias 0. Returns the network.
    """
    nn.Module.to(network, dtype)            # diffusers' own `to` warns where nothing is wrong
    if any(parameter.is_meta for parameter in network.parameters()):
        network.to_empty(device="cpu")
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        for piece in parameter.data.view(-1).split(BLOCK):
            torch.mul(block[: len(piece)], parameter[0].numel() ** -0.5, out=piece)
    return network.eval().requires_grad_(False)
