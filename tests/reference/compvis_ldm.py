"""The reference cases `compvis_ldm_*`: Stable Diffusion 1.x's UNet and VAE under single-file names.

`context_grad` is the gradient of the sum of the squared output with respect to the context;
`vae_decode_of_mean` decodes the mean of the moments without any scale.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from models.renaming import LAYOUTS
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights import Part, assign, on_meta

FIXED = {
    "use_spatial_transformer": True,
    "legacy": False,
    "double_z": True,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected) for the UNet, its gradient, and the VAE's moments and image."""
    for key, value in (config["unet"] | config["vae"]).items():
        if FIXED.get(key, value) != value:
            raise ValueError(f"{key} = {value} is not a network that this project has")
    unet, vae = (
        on_meta(lambda: UNet(unet_config(config["unet"]))),
        on_meta(lambda: VAE(vae_config(config["vae"]))),
    )
    state = {
        name.removeprefix("state."): t.float() for name, t in tensors.items() if name.startswith("state.")
    }
    assign([Part(unet, LAYOUTS["unet"]["single"]), Part(vae, LAYOUTS["vae"]["single"])], state, "the case")

    context = tensors["in.context"].clone().requires_grad_()
    out = unet(tensors["in.x"], tensors["in.t"], context)
    yield "out.unet", out.detach(), tensors["out.unet"]
    yield "out.context_grad", torch.autograd.grad(out.square().sum(), context)[0], tensors["out.context_grad"]
    with torch.no_grad():
        mean, logvar = vae.encode(tensors["in.image"]).chunk(2, dim=1)
        yield "out.vae_mean", mean, tensors["out.vae_mean"]
        yield "out.vae_logvar", logvar.clamp(-30, 20), tensors["out.vae_logvar"]
        yield "out.vae_decode_of_mean", vae.decode(mean), tensors["out.vae_decode_of_mean"]


def unet_config(c: dict) -> UNetConfig:
    """The case's UNet; attention_resolutions are downsampling factors, as here."""
    head_channels = c.get("num_head_channels", -1)
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention_resolutions=tuple(c["attention_resolutions"]),
        num_heads=c["num_heads"] if head_channels == -1 else None,
        head_channels=None if head_channels == -1 else head_channels,
        context_dim=c["context_dim"],
        transformer_depth=c.get("transformer_depth", 1),
        linear_proj=c.get("use_linear_in_transformer", False),
    )


def vae_config(c: dict) -> VAEConfig:
    """The case's VAE, with no scale."""
    config = VAEConfig(c["in_channels"], c["z_channels"], c["ch"], tuple(c["ch_mult"]), c["num_res_blocks"])
    return replace(config, scale=1.0)
