"""Loading a model from wherever it is, and saving it to the published layouts.

Everything ends in one object, and everything is strict: a file that does not fit is an error that names what
does not. Nothing from a file is executed. Files are written beside their place and renamed into it, so there
is never half a model.
"""

import re
from pathlib import Path
from typing import Literal

import torch

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.errors import ModelError
from models.files import open_tensors
from models.folder import read_folder, write_folder
from models.glide import GlideModel
from models.glide_file import cascade_files, read_cascade, read_glide, write_glide
from models.glide_hub import CASCADES, load_cascade
from models.kinds import GLIDE, kind_of
from models.latent import LatentModel
from models.offload import Offload
from models.setting import Setting, place
from models.single_file import SUFFIXES, read_single_file, write_single_file
from models.weights import STORED, choose_dtype

EMBEDDED = {"emoji": Path(__file__).parent / "data" / "emoji"}


def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    prediction: str | None = None,
    variant: str | None = None,
    checkpointing: Checkpointing = "none",
    attention: AttentionKind = "auto",
    offload: Offload = "none",
) -> LatentModel | GlideModel:
    """Load a model, frozen and ready to use.

    source: the name "emoji"; "glide" or "glide-inpaint", fetched once from OpenAI; a folder
    in the diffusers layout, or of GLIDE's base and upsample (.safetensors or .pt); a single .safetensors or .ckpt
    file as CompVis and Stability publish them; one of GLIDE's files, base.pt for example; or a hub id such as
    "stable-diffusion-v1-5/stable-diffusion-v1-5".
    dtype: None for the file's own (float16 becomes float32 on a CPU), "auto" for the fastest of the device.
    device: None for the GPU if there is one. prediction: "epsilon" or "v_prediction", over what the source
    says; an SD 2.x single file does not say. variant: "fp16" for files named model.fp16.safetensors.
    checkpointing, attention, offload: how it runs, see `Setting`.

    Raises ModelError for a source that is not there, cannot be read, or does not fit; for float16 on a CPU; and as
    `Setting` does.
    The files must stay as they are while the model is used: its weights are their memory maps wherever
    nothing has to be converted or moved.
    """
    device = choose_device(device)
    Setting(torch.float32, checkpointing, attention, offload)
    waits = offload != "none"
    how, where = (STORED, torch.device("cpu")) if waits else (dtype, device)
    model = _read(source, how, where, prediction, variant)
    place(model, Setting(choose_dtype(dtype, model.dtype, device), checkpointing, attention, offload), device)
    return model


def _read(
    source: str | Path, dtype: torch.dtype | str | None, device: torch.device, prediction: str | None,
    variant: str | None,
) -> LatentModel | GlideModel:  # fmt: skip
    """A model on a device, or waiting there."""
    if source in EMBEDDED:
        model = _read(EMBEDDED[source], dtype, device, prediction, variant)
        model.source = source
        return model
    if source in CASCADES:
        _refuse_options(source, prediction, variant)
        return load_cascade(source, dtype, device)
    path = Path(source)
    if path.is_dir():
        if cascade_files(path):
            _refuse_options(source, prediction, variant)
            return read_cascade(path, dtype, device)
        return read_folder(path, dtype, device, prediction, variant)
    if path.is_file() or path.suffix in SUFFIXES:
        if kind_of(open_tensors(path)) == GLIDE:
            _refuse_options(source, prediction, variant)
            return read_glide(path, dtype, device)
        return read_single_file(path, dtype, device, prediction)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        from models.hub import download

        return read_folder(download(str(source), variant), dtype, device, prediction, variant)
    known = ", ".join((*EMBEDDED, *CASCADES))
    raise ModelError(f"there is no file or folder {source}; the models known by name are: {known}")


def _refuse_options(source: str | Path, prediction: str | None, variant: str | None) -> None:
    if prediction or variant:
        raise ModelError(f"{source} is GLIDE's: prediction and variant are for Stable Diffusion, leave them out")


def choose_device(device: torch.device | str | None, must_be_there: bool = True) -> torch.device:
    """The device of a name; None is the GPU if there is one. Raises ModelError for one that there is not.

    must_be_there: False for a GPU that is only planned for.
    """
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"there is no device {device!r}: use cpu, or cuda for an NVIDIA GPU") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"models run on cpu and on cuda, not on {device.type}")
    if device.type == "cuda" and not has_gpu and must_be_there:
        raise ModelError("device cuda was asked for, but this torch sees no GPU: use cpu, or a CUDA build of torch")
    return device


def save(
    model: LatentModel | GlideModel,
    path: str | Path,
    layout: Literal["diffusers", "single"] = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a folder in the diffusers layout, or as a single .safetensors file (GLIDE's always, and without
    its upsampler, which is saved by itself).

    Tensors of the loaded file that no network uses go back to the layout that they came from: what went in
    comes out equal. dtype: what the networks' tensors are stored in, None for what they run in. A model
    folder at `path` is replaced. Raises ModelError for anything else that is there, for a released VAE, and
    for a model that the layout has no place for.
    """
    if layout not in ("diffusers", "single"):
        raise ModelError(f"there is no layout {layout!r}: use 'diffusers' or 'single'")
    if isinstance(model, GlideModel):
        write_glide(model, Path(path), dtype)
        return
    if model.released:
        raise ModelError(
            "the VAE was released from memory (release_encoder): load the model again to save it"
        )
    write = {"diffusers": write_folder, "single": write_single_file}[layout]
    write(model, Path(path), dtype)
