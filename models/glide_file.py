"""GLIDE's files: one network with its text transformer each, under the published names.

The four published files say nothing but their tensors; which one it is, its input channels tell. A model of other
sizes is written as .safetensors with its numbers and its merges in the metadata, and read back from there.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from models.configs import require_schedule
from models.described import described, require, unet_config, write_described
from models.errors import ModelError
from models.files import Weights
from models.glide import GlideModel
from models.glide_text import GlideText, GlideTextConfig
from models.glide_tokenizer import GlideTokenizer
from models.kinds import GLIDE as GLIDE_KIND
from models.kinds import STEM, kind_of
from models.presets import GLIDE, GlidePreset
from models.renaming import Layout
from models.unet import UNet
from models.weights import Part, fill, gather, on_meta

KEY = "oneword.glide"
PARTS = ("base", "upsample"), ("base_inpaint", "upsample_inpaint")
ENDINGS = ".safetensors", ".pt"


def read_glide(path: Path, dtype: torch.dtype | str | None, device: torch.device) -> GlideModel:
    """Load a file; the arguments are those of `models.load`. Raises ModelError for all that does not fit."""
    model = outline_glide(path)
    fill(_parts(model), Weights((path,)), dtype, device)
    return model


def outline_glide(path: Path) -> GlideModel:
    """What a file's shapes and metadata say, on the meta device; raises as `read_glide`."""
    shapes = Weights((path,)).shapes()
    if (kind := kind_of(shapes)) != GLIDE_KIND:
        raise ModelError(f"{path} is {kind}, and one of GLIDE's networks is needed")
    if model := described(path, KEY, lambda said: of_preset(*_understood(said), str(path))):
        return model
    preset = _published(shapes[STEM], path)
    return of_preset(preset, GlideTokenizer.gpt2(preset.text.length), str(path))


def of_preset(preset: GlidePreset, tokenizer: GlideTokenizer, source: str) -> GlideModel:
    """A network on the meta device."""
    return GlideModel(
        unet=on_meta(lambda: UNet(preset.unet)), text=on_meta(lambda: GlideText(preset.text)), tokenizer=tokenizer,
        schedule=dict(preset.schedule), resolution=preset.resolution, factor=preset.factor,
        inpaints=preset.inpaints, source=source, prediction=preset.prediction,
    )  # fmt: skip


def cascade_files(folder: Path) -> list[Path]:
    """The base model's file in a folder, and the upsampler's if there is one; none if the folder holds no GLIDE.

    A folder of both pairs is that of the plain one. Raises ModelError for an upsampler alone.
    """
    for parts in PARTS:
        found = [next((p for s in ENDINGS if (p := folder / (name + s)).is_file()), None) for name in parts]
        if found[1] and not found[0]:
            base = " or ".join(parts[0] + ending for ending in ENDINGS)
            raise ModelError(f"{folder} holds the upsampler {found[1].name} and no {base}: add it")
        if found[0]:
            return [path for path in found if path is not None]
    return []


def read_cascade(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device, upsampler: bool = True
) -> GlideModel:
    """The base model of such a folder with its upsampler, if there is one; the arguments are those of `models.load`."""
    base, *more = (read_glide(path, dtype, device) for path in cascade_files(folder)[: None if upsampler else 1])
    if base.factor > 1:
        raise ModelError(f"{base.source} is an upsampler: the base network goes by that name, it by upsample")
    return replace(base, source=str(folder), upsampler=more[0] if more else None)


def write_glide(model: GlideModel, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model, without its upsampler, beside `path` and rename it into place; another of this kind is replaced.

    Raises ModelError for a path that is taken by anything else, or is no .safetensors.
    """
    said = {
        "unet": asdict(model.unet.config), "text": asdict(model.text.config), "schedule": model.schedule,
        "resolution": model.resolution, "factor": model.factor, "inpaints": model.inpaints,
        "prediction": model.prediction,
        "merges": [" ".join(pair) for pair in model.tokenizer.merges],
    }  # fmt: skip
    write_described(path, KEY, said, {n: t for part in _parts(model) for n, t in gather(part, dtype).items()})


def _parts(model: GlideModel) -> list[Part]:
    return [Part(model.unet, Layout()), Part(model.text, Layout())]


def _published(stem: tuple[int, ...], path: Path) -> GlidePreset:
    """The published network whose first convolution has this shape."""
    for preset in GLIDE.values():
        if stem[:2] == (preset.unet.model_channels, preset.unet.in_channels):
            return preset
    raise ModelError(
        f"{path} is none of GLIDE's published networks ({', '.join(GLIDE)}): its first convolution is {stem}"
    )


def _understood(said: dict[str, Any]) -> tuple[GlidePreset, GlideTokenizer]:
    """The network and tokenizer that `write_glide` described."""
    merges = [tuple(pair.split(" ")) for pair in said.pop("merges")]
    unet, text = unet_config(said.pop("unet")), GlideTextConfig(**said.pop("text"))
    require(said, {"factor": int, "resolution": int, "inpaints": bool, "schedule": dict})
    require_schedule(said["schedule"].get("name"), "its description")
    return GlidePreset(unet, text, **said), GlideTokenizer(merges, text.length)
