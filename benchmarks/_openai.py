"""OpenAI's own GLIDE as the peer, if it is installed; no registry has it, so nothing here needs it.

    pip install git+https://github.com/openai/glide-text2im

It knows float32 and, on CUDA, float16.
"""

import importlib.util
from types import SimpleNamespace

import torch
from torch import nn

from models.presets import GlidePreset


def is_installed() -> bool:
    """Whether there is this peer."""
    return importlib.util.find_spec("glide_text2im") is not None


def openai_network(preset: GlidePreset) -> nn.Module:
    """The UNet with its text transformer, base or upsampler, on the meta device; forward(x, t, tokens, mask)."""
    from glide_text2im.text2im_model import SuperResText2ImUNet, Text2ImUNet

    unet, text = preset.unet, preset.text
    with torch.device("meta"):
        return (Text2ImUNet if preset.factor == 1 else SuperResText2ImUNet)(
            text_ctx=text.length, xf_width=text.width, xf_layers=text.layers, xf_heads=text.heads, xf_final_ln=True,
            xf_padding=True, tokenizer=SimpleNamespace(n_vocab=text.vocab_size), in_channels=3,
            out_channels=unet.out_channels, model_channels=unet.model_channels, channel_mult=unet.channel_mult,
            num_res_blocks=unet.num_res_blocks, attention_resolutions=unet.attention_resolutions,
            num_head_channels=unet.head_channels, resblock_updown=True, use_scale_shift_norm=True,
        )  # fmt: skip
