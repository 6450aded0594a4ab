"""The diffusers layout: a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/.

Both ways: a folder that is read and written again holds equal tensors under equal names. Two subfolders may be missing:
without tokenizer/ the vocabulary is CLIP's, without scheduler/ the schedule is Stable Diffusion's.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models import configs, presets
from models.errors import OF_WRONG_KINDS, ModelError
from models.files import SUFFIXES, find_weights, read_json
from models.latent import LatentModel
from models.renaming import LAYOUTS
from models.replacing import own_name
from models.text import ClipText, ClipTextConfig
from models.tokenizer import ClipTokenizer
from models.unet import UNet
from models.vae import VAE
from models.weights import Part, best_layout, fill, gather, on_meta, write_safetensors

Config = TypeVar("Config")

DIFFUSION_STEM = "diffusion_pytorch_model"
STEMS = {"unet": (DIFFUSION_STEM,), "vae": (DIFFUSION_STEM,), "text_encoder": ("model", "pytorch_model")}
OTHER_FAMILIES = ("text_encoder_2", "transformer", "prior")
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def read_folder(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device, prediction: str | None, variant: str | None
) -> LatentModel:
    """Load a folder; arguments as in `models.load`. Raises ModelError for all that does not fit."""
    model = outline_folder(folder, prediction)
    for part, (role, network) in _networks(model).items():
        weights = find_weights(folder / part, STEMS[part], variant)
        known = {name: Part(network, how) for name, how in LAYOUTS[role].items() if name.startswith("diffusers")}
        model.names[role] = best_layout(known, weights.names())
        model.kept[role] = fill([known[model.names[role]]], weights, dtype, device)
    return model


def outline_folder(folder: Path, prediction: str | None) -> LatentModel:
    """What the configurations in a folder say, on the meta device; raises as `read_folder`."""
    for other in OTHER_FAMILIES:
        if (folder / other).exists():
            raise ModelError(f"{folder} has a {other}: it is not a Stable Diffusion 1.x or 2.x model")
    if folder.name in STEMS and not (folder / "unet").exists() and (folder.parent / "unet").exists():
        raise ModelError(f"{folder} is one network of a model: name the folder that it lies in, {folder.parent}")
    if not (folder / "unet").exists() and (inside := _models_in(folder)):
        raise ModelError(f"{folder} is no model, and holds {len(inside)} that may be: name one of them, as {inside[0]}")
    files = {part: folder / part / "config.json" for part in STEMS}
    unet = _built(UNet, configs.read_unet, files["unet"])
    vae = _built(VAE, configs.read_vae, files["vae"])
    text = _built(ClipText, configs.read_text, files["text_encoder"])
    schedule, says = _schedule(folder / "scheduler" / "scheduler_config.json", text.config)
    if (says := prediction or says) is None:
        raise ModelError(f"{folder} does not say what it predicts: give prediction='epsilon' or 'v_prediction'")
    return LatentModel(
        family=presets.family_of(text.config),
        unet=unet,
        vae=vae,
        text=text,
        tokenizer=_tokenizer(folder / "tokenizer", text.config),
        schedule=schedule,
        prediction=says,
        resolution=_understood(configs.read_sample_size, files["unet"]) * vae.factor,
        source=str(folder),
    )


def write_folder(model: LatentModel, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model beside `path`, or beside what it links to, and rename it into place.

    Raises ModelError if that is another's place, holds the folder that this process runs in, or is called as files are.
    """
    if path.suffix in SUFFIXES:
        raise ModelError(f"{path} is called as files are, and this layout is a folder: give layout='single'")
    path = Path(os.path.realpath(path))
    if path.exists() and not _is_ours(path):
        raise ModelError(f"{path} exists and is not a model folder: choose another path, or remove it")
    if Path(os.path.realpath(".")).is_relative_to(path):
        raise ModelError(f"{path} is or holds the working folder, which cannot be replaced: save into another folder")
    tokens = model.tokenizer
    said = {
        "unet": configs.write_unet(model.unet.config, model.resolution // model.vae.factor),
        "vae": configs.write_vae(model.vae.config, model.resolution),
        "text_encoder": configs.write_text(model.text.config, tokens.begin, tokens.end, tokens.pad),
    }
    beside = own_name(path, "part")
    beside.mkdir(parents=True)
    try:
        for part, (role, network) in _networks(model).items():
            layout = LAYOUTS[role][model.names.get(role, "diffusers")]
            tensors = gather(Part(network, layout), dtype) | model.kept.get(role, {})
            write_safetensors(beside / part / f"{STEMS[part][0]}.safetensors", tensors)
            _write_json(beside / part / "config.json", said[part])
        model.tokenizer.save(beside / "tokenizer")
        schedule = configs.write_schedule(model.schedule, model.prediction)
        _write_json(beside / "scheduler" / "scheduler_config.json", schedule)
        _write_json(beside / "model_index.json", INDEX)
        _replace(path, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _networks(model: LatentModel) -> dict[str, tuple[str, nn.Module]]:
    """Subfolder -> role in LAYOUTS, network."""
    return {"unet": ("unet", model.unet), "vae": ("vae", model.vae), "text_encoder": ("text", model.text)}


def _schedule(file: Path, text: ClipTextConfig) -> tuple[dict[str, Any], str | None]:
    if file.is_file():
        return _understood(configs.read_schedule, file)
    return dict(presets.SD_SCHEDULE), "epsilon" if presets.family_of(text) == "sd1" else None


def _tokenizer(folder: Path, text: ClipTextConfig) -> ClipTokenizer:
    if folder.is_dir():
        return ClipTokenizer.from_folder(folder, text.length)
    return ClipTokenizer.clip(text.length, presets.SD2_V.pad if presets.family_of(text) == "sd2" else None)


def _models_in(folder: Path) -> list[Path]:
    """Model folders that lie in a folder, then single files."""
    files = (".safetensors", ".ckpt")
    found = [path for path in folder.iterdir() if path.suffix in files or (path / "unet" / "config.json").exists()]
    return sorted(found, key=lambda path: (path.is_file(), path))


def _is_ours(path: Path) -> bool:
    """Whether a path is a model folder or an empty one, which may be replaced."""
    return path.is_dir() and ((path / "model_index.json").exists() or not any(path.iterdir()))


def _replace(path: Path, new: Path) -> None:
    """Put a folder in the place of another, with what else lay there; the old one is moved aside and removed last.

    It is moved back if the new one cannot take its place.
    """
    old = own_name(path, "old")
    if path.exists():
        for other in path.iterdir():
            if not (new / other.name).exists():
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, new / other.name)
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _built(
    network: Callable[[Config], nn.Module], read: Callable[[dict[str, Any], str], Config], file: Path
) -> nn.Module:
    """A network of what a config.json says, on the meta device; raises as `_understood`."""
    return _understood(lambda said, where: on_meta(lambda: network(read(said, where))), file)


def _understood(read: Callable[[dict[str, Any], str], Config], file: Path) -> Config:
    """What a JSON file says, read by a function of `configs`. Raises ModelError if a value is of no use to it."""
    if not file.is_file():
        raise ModelError(f"there is no {file}: a model folder has a config in unet/, vae/ and text_encoder/")
    try:
        return read(read_json(file), str(file))
    except ModelError:
        raise
    except OF_WRONG_KINDS as error:
        raise ModelError(f"a setting in {file} has a value of a wrong kind ({error})") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
