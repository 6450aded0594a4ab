"""OpenAI's GLIDE files by their names, fetched once.

A file counts as fetched only when all of its bytes have come, and is only used if every tensor has the name and shape
of the network that it should be; what is refused is named, to be removed.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from models.devices import choose_device
from models.errors import ModelError
from models.fetching import cache, fetch_all, to_be_removed
from models.files import Weights, as_path
from models.glide import GlideModel
from models.glide_file import read_glide
from models.noisy_clip import NoisyClip, NoisyClipConfig
from models.presets import GLIDE
from models.renaming import Layout
from models.weights import Part, choose_dtype, fill, on_meta

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
CASCADES = {"glide": ("base", "upsample"), "glide-inpaint": ("base_inpaint", "upsample_inpaint")}
CLIP = ("clip_text_enc", "clip_image_enc")


def load_cascade(
    name: str, dtype: torch.dtype | str | None, device: torch.device, upsampler: bool = True
) -> GlideModel:
    """The base model of a cascade with its upsampler; arguments as in `models.load`.

    Raises ModelError if a file is neither in the cache nor can be fetched, or is not what it should be.
    """
    parts = CASCADES[name][: None if upsampler else 1]
    base, *more = (_checked(path, part, dtype, device) for part, path in zip(parts, fetched(parts)))
    return replace(base, source=name, upsampler=more[0] if more else None)


def load_noisy_clip(
    source: str | Path = "glide", dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> NoisyClip:
    """GLIDE's noise-aware CLIP, frozen, for `guidance.clip_gradient`.

    source: "glide", fetched once from OpenAI as `models.load` does, or a folder of clip_text_enc.pt and
    clip_image_enc.pt. dtype, device: as in `models.load`. Raises ModelError for what is not there or does not fit.
    """
    device = choose_device(device)
    choose_dtype(dtype, torch.float32, device)          # refused before anything is fetched
    paths = fetched(CLIP) if source == "glide" else [as_path(source) / f"{part}.pt" for part in CLIP]
    clip = on_meta(lambda: NoisyClip(NoisyClipConfig()))
    for path, encoder in zip(paths, (clip.text_encoder, clip.image_encoder)):
        if not path.is_file():
            raise ModelError(f"there is no {path}: a folder of CLIP holds clip_text_enc.pt and clip_image_enc.pt")
        with to_be_removed(path) if source == "glide" else nullcontext():
            fill([Part(encoder, Layout())], Weights((path,)), dtype, device)
    return clip


def fetched(parts: Sequence[str]) -> list[Path]:
    """The files of several networks. Raises ModelError as `fetch_all`."""
    return fetch_all({f"{ADDRESS}/{part}.pt": cache("glide") / f"{part}.pt" for part in parts})


def _checked(path: Path, part: str, dtype: torch.dtype | str | None, device: torch.device) -> GlideModel:
    with to_be_removed(path):
        model = read_glide(path, dtype, device)
        for name, preset in GLIDE.items():
            if model.unet.config == preset.unet and name != part:
                raise ModelError(f"{path} is GLIDE's {name}, and should be its {part}")
    return model
