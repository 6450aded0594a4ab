"""A whole latent diffusion model of random weights, small enough that a test can train with it.

16x16 pixels, latents 4x8x8, contexts of 24 tokens 32 wide, a tokenizer over a few words. Every weight is
random, the layers that a new network starts at zero too, so that gradients flow everywhere.
"""

from functools import cache

import torch
from torch import nn

from models import ClassModel, ClipTokenizer, GlideModel, LatentModel
from models.class_names import ClassNames
from models.glide_text import GlideText, GlideTextConfig
from models.glide_tokenizer import GlideTokenizer
from models.text import ClipText, ClipTextConfig
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig

CAPTIONS = [
    "a photo of a dog",
    "a picture of a cat",
    "an emoji of a large white dog",
    "a drawing in the style of a cat",
]


@cache
def tiny_tokenizer() -> ClipTokenizer:
    """The words of `CAPTIONS`, one token each; any other text in pieces. 24 tokens long."""
    return ClipTokenizer.train(CAPTIONS * 10, vocab_size=600, length=24)


def tiny_model(seed: int = 0, prediction: str = "epsilon") -> LatentModel:
    """A frozen LatentModel in float32 on the CPU; the same seed gives the same weights."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        unet = UNet(UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=32))
        vae = VAE(VAEConfig(3, 4, 32, (1, 1), 1, scale=1.7))
        text = ClipText(ClipTextConfig(tokenizer.vocab_size, tokenizer.length, 32, 2, 2, 64))
        for network in (unet, vae, text):
            randomise(network)
    return LatentModel(
        family="tiny", unet=unet, vae=vae, text=text, tokenizer=tokenizer,
        schedule={"name": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012},
        prediction=prediction, resolution=16, source=f"tiny:{seed}",
    )  # fmt: skip


@cache
def tiny_glide_tokenizer() -> GlideTokenizer:
    """The words of `CAPTIONS`, one token each; any other text in pieces. 24 tokens long."""
    return GlideTokenizer.train(CAPTIONS * 10, vocab_size=340, length=24)


def tiny_glide(seed: int = 0, factor: int = 1, inpaints: bool = False) -> GlideModel:
    """A frozen GLIDE network of 16x16 pixels, an upsampler of `factor` times as many; its text is 32 wide."""
    tokenizer = tiny_glide_tokenizer()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = UNetConfig(
            3 + 3 * (factor > 1) + 4 * inpaints, 6, 32, (1, 2), 1, (2,), None, 16, 32, attention="joint",
            resblock_updown=True, scale_shift=True,
        )  # fmt: skip
        unet, text = UNet(config), GlideText(GlideTextConfig(tokenizer.vocab_size, tokenizer.length, 32, 2, 2, 128))
        for network in (unet, text):
            randomise(network)
    schedule = {"name": "linear" if factor > 1 else "squaredcos_cap_v2", "steps": 1000}
    return GlideModel(
        unet, text, tokenizer, schedule, 16 * factor, factor, inpaints, f"tiny GLIDE:{seed}"
    )


def tiny_classes(
    seed: int = 0, classes: tuple[str, ...] = ("dog", "cat", "owl"), factor: int = 1, size: int | None = None
) -> ClassModel:
    """A frozen model of three classes, or of those given, that met ∅ too; 16x16 pixels, or an upsampler to `factor`
    times as many.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = UNetConfig(
            3 + 3 * (factor > 1), 6, 32, (1, 2), 1, (2,), None, 16, 0, attention="self", resblock_updown=True,
            scale_shift=True, num_classes=len(classes) or None,
        )  # fmt: skip
        unet = UNet(config)
        randomise(unet)
    schedule = {"name": "linear" if factor > 1 else "squaredcos_cap_v2", "steps": 1000}
    return ClassModel(
        unet, ClassNames(classes), schedule, size or 16 * factor, f"tiny classes:{seed}", null=True, factor=factor
    )


def randomise(network: nn.Module) -> None:
    """Random weights that keep activations near 1, from torch's own generator; frozen, in eval mode."""
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn_like(parameter) * (fan_in**-0.5 if parameter.ndim > 1 else 0.1)
        centre = 0.0 if parameter.ndim > 1 else parameter.detach().mean().round()  # 1 for the scale of a norm
        parameter.data = centre + noise
    network.eval().requires_grad_(False)
