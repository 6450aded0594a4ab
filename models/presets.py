"""The published models in numbers, and one small enough for tests.

Stable Diffusion 1.4 and 1.5 are one architecture trained for longer, and so are 2.0 and 2.1. In 2.x the
models for 512 pixels predict epsilon and those for 768 predict v; everything else about them is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.classifier import ClassifierConfig
from models.glide_text import GlideTextConfig
from models.latent import LatentModel
from models.text import ClipText, ClipTextConfig
from models.tokenizer import ClipTokenizer
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.vocabulary import clip_vocabulary, from_merges
from models.weights import on_meta

SD_SCHEDULE: dict[str, Any] = {
    "name": "scaled_linear",
    "steps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "zero_terminal_snr": False,
}
COSINE: dict[str, Any] = {"name": "squaredcos_cap_v2", "steps": 1000}
LINEAR: dict[str, Any] = {"name": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass(frozen=True)
class Preset:
    """A latent diffusion model in numbers; the fields are those of LatentModel.

    pad: the tokenizer's padding id, None for the end token. merges: how many of CLIP's merges its vocabulary
    has, None for all.
    """

    family: str
    unet: UNetConfig
    vae: VAEConfig
    text: ClipTextConfig
    pad: int | None
    prediction: str
    resolution: int
    merges: int | None = None


SD2_UNET = UNetConfig(num_heads=None, head_channels=64, context_dim=1024, linear_proj=True)
SD2_TEXT = ClipTextConfig(width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu")
SD1 = Preset("sd1", UNetConfig(), VAEConfig(), ClipTextConfig(), None, "epsilon", 512)
SD2_BASE = Preset("sd2", SD2_UNET, VAEConfig(), SD2_TEXT, 0, "epsilon", 512)
SD2_V = Preset("sd2", SD2_UNET, VAEConfig(), SD2_TEXT, 0, "v_prediction", 768)
TINY = Preset(
    "tiny",
    UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1), num_heads=2,
        context_dim=32,
    ),
    VAEConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    ClipTextConfig(vocab_size=1514, length=32, width=32, layers=2, heads=2, mlp_width=64),
    None,
    "epsilon",
    32,
    merges=1000,
)  # fmt: skip


@dataclass(frozen=True)
class GlidePreset:
    """One of GLIDE's networks in numbers; the fields are those of GlideModel."""

    unet: UNetConfig
    text: GlideTextConfig
    schedule: dict[str, Any]
    resolution: int
    factor: int = 1
    inpaints: bool = False
    prediction: str = "epsilon"

    def inpainting(self) -> "GlidePreset":
        """The form that sees what of an image is to be kept."""
        return replace(self, unet=replace(self.unet, in_channels=self.unet.in_channels + 4), inpaints=True)


GLIDE_UNET = UNetConfig(
    3, 6, 192, (1, 2, 3, 4), 3, (8, 4, 2), None, 64, 512, attention="joint", resblock_updown=True, scale_shift=True
)
GLIDE_BASE = GlidePreset(GLIDE_UNET, GlideTextConfig(), COSINE, 64)
GLIDE_UPSAMPLE = GlidePreset(
    replace(
        GLIDE_UNET, in_channels=6, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(32, 16, 8)
    ),
    GlideTextConfig(),
    LINEAR,
    256,
    factor=4,
)
GLIDE: dict[str, GlidePreset] = {
    "base": GLIDE_BASE,
    "upsample": GLIDE_UPSAMPLE,
    "base_inpaint": GLIDE_BASE.inpainting(),
    "upsample_inpaint": GLIDE_UPSAMPLE.inpainting(),
}


@dataclass(frozen=True)
class ClassPreset:
    """One of guided-diffusion's models in numbers; the fields are those of ClassModel."""

    unet: UNetConfig
    schedule: dict[str, Any]
    resolution: int
    factor: int = 1


MULTIPLES = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def _adm(size: int, channels: int, out_channels: int, res_blocks: int, **more: Any) -> UNetConfig:
    """What all of guided-diffusion's networks have alike: attention at 32, 16 and 8 pixels, blocks that resample."""
    attends = tuple(size // side for side in (32, 16, 8))
    alike = {"num_heads": None, "head_channels": 64, "attention": "self_legacy", "context_dim": 0}
    alike |= {"resblock_updown": True, "scale_shift": True}
    return UNetConfig(3, out_channels, channels, MULTIPLES[size], res_blocks, attends, **alike | more)


def _upsampler(size: int, sides: tuple[int, ...], **heads: int | None) -> ClassPreset:
    """One of the two that enlarge four times, with attention at so many pixels."""
    config = _adm(256, 192, 6, 2, num_classes=1000, **heads)
    config = replace(config, in_channels=6, attention_resolutions=tuple(size // side for side in sides))
    return ClassPreset(config, LINEAR, size, factor=4)


def _classifier(size: int, res_blocks: int) -> ClassifierConfig:
    return ClassifierConfig(_adm(size, 128, 1000, res_blocks), size)


ADM: dict[str, ClassPreset] = {
    "64": ClassPreset(_adm(64, 192, 6, 3, num_classes=1000, attention="self"), COSINE, 64),
    "128": ClassPreset(_adm(128, 256, 6, 2, num_classes=1000, num_heads=4, head_channels=None), LINEAR, 128),
    "256": ClassPreset(_adm(256, 256, 6, 2, num_classes=1000), LINEAR, 256),
    "256-uncond": ClassPreset(_adm(256, 256, 6, 2), LINEAR, 256),
    "512": ClassPreset(_adm(512, 256, 6, 2, num_classes=1000), LINEAR, 512),
}
ADM_UPSAMPLERS: dict[str, ClassPreset] = {
    "64-256": _upsampler(256, (32, 16, 8), num_heads=4, head_channels=None),
    "128-512": _upsampler(512, (32, 16)),
}
ADM_CLASSIFIERS = {str(size): _classifier(size, 4 if size == 64 else 2) for size in MULTIPLES}

PRESETS: dict[str, Preset] = {
    "sd1.4": SD1,
    "sd1.5": SD1,
    "sd2.0": SD2_V,
    "sd2.0-base": SD2_BASE,
    "sd2.1": SD2_V,
    "sd2.1-base": SD2_BASE,
    "tiny": TINY,
}


def family_of(text: ClipTextConfig) -> str:
    """The family that a text transformer tells: "sd1", "sd2", "emoji", or "custom"."""
    known = {("quick_gelu", 768): "sd1", ("gelu", 1024): "sd2", ("quick_gelu", 160): "emoji"}
    return known.get((text.activation, text.width), "custom")


def untrained(preset: Preset) -> LatentModel:
    """A model of random weights (from torch's global generator), frozen, in float32 on the CPU."""
    return _of(preset, lambda make: make().requires_grad_(False).eval())


def outline_preset(preset: Preset) -> LatentModel:
    """A model on the meta device: sizes without numbers."""
    return _of(preset, on_meta)


def _of(preset: Preset, build: Callable[[Callable[[], nn.Module]], Any]) -> LatentModel:
    vocabulary = clip_vocabulary()
    if preset.merges is not None:
        vocabulary = from_merges(vocabulary.merges[: preset.merges])
    return LatentModel(
        family=preset.family,
        unet=build(lambda: UNet(preset.unet)),
        vae=build(lambda: VAE(preset.vae)),
        text=build(lambda: ClipText(preset.text)),
        tokenizer=ClipTokenizer(vocabulary, preset.text.length, preset.pad),
        schedule=dict(SD_SCHEDULE),
        prediction=preset.prediction,
        resolution=preset.resolution,
        source=f"untrained {preset.family}",
    )
