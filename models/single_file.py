"""The single-file layout of CompVis and Stability: every tensor of a model in one .safetensors or .ckpt file.

Such a file has no configuration; it is read off the shapes (`models.shapes`), so what a shape cannot say
cannot be written. Whether an SD 2.x file predicts v has a public place in the metadata of .safetensors files,
the model specification's `modelspec.prediction_type`, `predict_key` in ComfyUI's; where it is missing, an empty
tensor `v_pred` says it, and where that is, too, the caller. `ztsnr` is another such mark, of a zero terminal SNR. The
side of the images that a model was trained on stands in `modelspec.resolution`; where it does not, it is the family's.
"""

import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import presets, shapes
from models.errors import ModelError
from models.files import Weights, metadata
from models.kinds import STABLE_DIFFUSION, kind_of
from models.latent import LatentModel
from models.renaming import LAYOUTS
from models.text import ClipText
from models.tokenizer import ClipTokenizer
from models.unet import UNet
from models.vae import VAE
from models.vocabulary import clip_vocabulary
from models.weights import Part, fill, gather, on_meta, write_safetensors

MODELSPEC = {"v": "v_prediction", "epsilon": "epsilon", "v_prediction": "v_prediction"}
SPEC_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
SIDE_KEY = "modelspec.resolution"           # 512x512
SD2_WIDTH = presets.SD2_TEXT.width
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"


def read_single_file(
    path: Path, dtype: torch.dtype | str | None, device: torch.device, prediction: str | None
) -> LatentModel:
    """Load a file; the arguments are those of `models.load`. Raises ModelError for all that does not fit."""
    model = outline_file(path, prediction)
    model.kept["single"] = fill(_parts(model), Weights((path,)), dtype, device)
    return model


def outline_file(path: Path, prediction: str | None) -> LatentModel:
    """What the shapes in a file say, on the meta device; raises as `read_single_file`."""
    found = Weights((path,)).shapes()
    if (kind := kind_of(found)) != STABLE_DIFFUSION:
        raise ModelError(
            f"{path} is no Stable Diffusion checkpoint, but {kind}: a file of 1.x or 2.x holds UNet, VAE and "
            f"text encoder, the first under {shapes.UNET}..."
        )
    table = found.get(f"{LAYOUTS['text']['single openclip sgm'].prefix}token_embedding.weight", ())
    if any(name.startswith("conditioner.") for name in found) and table[-1:] != (SD2_WIDTH,):
        raise ModelError(f"{path} is a Stable Diffusion XL or Video checkpoint; 1.x and 2.x are supported")
    unet, vae = shapes.unet_config(found, str(path)), shapes.vae_config(found, str(path))
    text = shapes.text_config(found, str(path))
    family = presets.family_of(text)
    says = prediction or _stated(path, found) or ("epsilon" if family == "sd1" else None)
    if says is None:
        raise ModelError(
            f"{path} is a Stable Diffusion 2.x file, which does not say what it predicts: give prediction="
            f"'v_prediction' for a 768-pixel model, 'epsilon' for a 512-pixel base model"
        )
    return LatentModel(
        family=family,
        unet=on_meta(lambda: UNet(unet)),
        vae=on_meta(lambda: VAE(vae)),
        text=on_meta(lambda: ClipText(text)),
        tokenizer=_tokenizer(family, text.length),
        schedule=_schedule(found),
        prediction=says,
        resolution=_side(path) or (768 if family == "sd2" and says == "v_prediction" else 512),
        source=str(path),
        names={"single": shapes.tower(found)},
    )


def write_single_file(model: LatentModel, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model beside `path` and rename it into place.

    Raises ModelError for a path that is taken or no .safetensors, and for a model that a file cannot tell.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"a single file is written as .safetensors; {path} ends in {path.suffix!r}")
    if path.exists():
        raise ModelError(f"{path} exists: choose another path, or remove it")
    tensors: dict[str, Tensor] = {}
    for part in _parts(model):
        tensors |= gather(part, dtype)
    tensors |= model.kept.get("single", {})
    if model.prediction != "v_prediction":
        tensors.pop(V_MARK, None)           # the caller of `load` knew better
    _refuse_what_is_lost(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    spec = next(word for word, prediction in MODELSPEC.items() if prediction == model.prediction)
    write_safetensors(path, tensors, {SPEC_KEYS[0]: spec, SIDE_KEY: f"{model.resolution}x{model.resolution}"})


def _parts(model: LatentModel) -> list[Part]:
    """A model's networks and how a single file of its family names them."""
    usual = "single openclip" if model.text.config.activation == "gelu" else "single"
    tower = model.names.get("single", usual)
    return [
        Part(model.unet, LAYOUTS["unet"]["single"]),
        Part(model.vae, LAYOUTS["vae"]["single"]),
        Part(model.text, LAYOUTS["text"][tower]),
    ]


def _stated(path: Path, names: Container[str]) -> str | None:
    """The prediction that a file names, if it does. Raises ModelError if that is neither epsilon nor v."""
    spec = metadata(path)
    said = next((spec[key] for key in SPEC_KEYS if spec.get(key)), None)
    if said is None:
        return "v_prediction" if V_MARK in names else None
    if said not in MODELSPEC:
        raise ModelError(f"{path} says that it predicts {said!r}; known are {', '.join(MODELSPEC)}: give prediction=")
    return MODELSPEC[said]


def _side(path: Path) -> int | None:
    """The side of a file's square images, if it names one."""
    square = re.fullmatch(r"([1-9]\d{1,4})x\1", metadata(path).get(SIDE_KEY, ""))
    return int(square[1]) if square and int(square[1]) % 8 == 0 else None


def _tokenizer(family: str, length: int) -> ClipTokenizer:
    return ClipTokenizer.clip(length, presets.SD2_V.pad if family == "sd2" else None)


def _schedule(names: Container[str]) -> dict[str, Any]:
    """The noise schedule of a file with tensors of these names."""
    return presets.SD_SCHEDULE | {"zero_terminal_snr": ZERO_SNR_MARK in names}


def _refuse_what_is_lost(model: LatentModel, found: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless reading the file back would give this model."""
    where, unet = "a single file", model.unet.config
    coarse_first = tuple(sorted(unet.attention_resolutions, reverse=True))
    differs = {
        "the UNet": shapes.unet_config(found, where) != replace(unet, attention_resolutions=coarse_first),
        "the VAE": shapes.vae_config(found, where) != model.vae.config,
        "the text transformer": shapes.text_config(found, where) != model.text.config,
        "the vocabulary": model.tokenizer.vocabulary != clip_vocabulary(),
        "the padding": model.tokenizer.pad != _tokenizer(model.family, model.tokenizer.length).pad,
        "the noise schedule": presets.SD_SCHEDULE | model.schedule != _schedule(found),
    }
    if lost := [what for what, unlike in differs.items() if unlike]:
        raise ModelError(f"{where} cannot hold {' and '.join(lost)} of {model.source}: save it as a folder")
