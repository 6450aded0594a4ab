"""Loading a model from wherever it is, and saving it to the published layouts.

Everything ends in one object, and everything is strict: a file that does not fit is an error that names what
does not. Nothing from a file is executed. Files are written beside their place and renamed into it, so there
is never half a model.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.class_file import read_class_model, write_class_model
from models.class_hub import FILES, load_published
from models.class_model import ClassModel
from models.devices import choose_device
from models.errors import ModelError
from models.files import SUFFIXES, as_path, open_tensors
from models.folder import read_folder, write_folder
from models.glide import GlideModel
from models.glide_file import cascade_files, read_cascade, read_glide, write_glide
from models.glide_hub import CASCADES, load_cascade
from models.glide_text import GlideText
from models.heap import expect_large_blocks
from models.hub import download, fetched_whole, is_id
from models.kinds import CLASSIFIER, GLIDE, GUIDED_DIFFUSION, kind_of
from models.latent import LatentModel
from models.lending import my_turn
from models.offload import Offload
from models.setting import Setting, place
from models.single_file import read_single_file, write_single_file
from models.text import ClipText
from models.unet import UNet
from models.vae import VAE
from models.weights import STORED, choose_dtype, on_meta

DATA = Path(__file__).parent / "data"
EMBEDDED = {
    "emoji": DATA / "emoji",
    "emoji-glide": DATA / "emoji_glide",
    "emoji-classes": DATA / "emoji_classes" / "model.safetensors",
}
Model = LatentModel | GlideModel | ClassModel


@torch.inference_mode(False)                            # the model may be learned with elsewhere
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
    config: Mapping[str, Any] | None = None,
    upsampler: bool = True,
) -> Model:
    """Load a model, frozen and ready to use.

    source: the name "emoji", "emoji-glide" or "emoji-classes", which come with the project; "glide" or "glide-inpaint",
    or "adm-64", "adm-128", "adm-256", "adm-256-uncond", "adm-512", "adm-64-256" or "adm-128-512" (upsamplers) of
    guided-diffusion, fetched once from OpenAI; a folder in the diffusers layout, or of GLIDE's base and upsample
    (.safetensors or .pt); a single .safetensors or .ckpt file as CompVis and Stability publish them; one of GLIDE's or
    guided-diffusion's files, base.pt for example; or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
    dtype: None for the file's own (float16 becomes float32 on a CPU), "auto" for the fastest of the device.
    device: None for the GPU if there is one. prediction: "epsilon" or "v_prediction", over what the source
    says; few SD 2.x single files say. variant: "fp16" for files named model.fp16.safetensors. checkpointing,
    attention, offload: how it runs, see `Setting`. config: what the tensors of a guided-diffusion UNet do not tell, if
    it is none of the published: see `models.class_shapes.OPEN`. upsampler: load it, too, where a model comes with one.

    Raises ModelError for a source that is not there, cannot be read, or does not fit; for float16 on a CPU; and as
    `Setting` does.
    The files must stay as they are while the model is used: its weights are their memory maps wherever
    nothing has to be converted or moved.
    """
    device, options = choose_device(device), {"prediction": prediction, "variant": variant, "config": config}
    Setting(choose_dtype(dtype, torch.float32, device), checkpointing, attention, offload)    # before a fetch
    if device.type == "cpu":
        expect_large_blocks()
    waits = offload != "none"
    how, where = (STORED, torch.device("cpu")) if waits else (dtype, device)
    model = _read(source, how, where, options, upsampler)
    setting = Setting(choose_dtype(dtype, model.dtype, device), checkpointing, attention, offload)
    place(model, setting, device, own_dtypes=dtype is None)
    return model


def _read(
    source: str | Path, dtype: torch.dtype | str | None, device: torch.device, options: dict[str, Any], upsampler: bool
) -> Model:
    """A model on a device, or waiting there."""
    if source in EMBEDDED:
        model = _read(EMBEDDED[source], dtype, device, options, upsampler)
        model.source = source
        return model
    if source in CASCADES or source in FILES:
        _take(source, options)
        if source in CASCADES:
            return load_cascade(source, dtype, device, upsampler)
        return load_published(source, dtype, device)
    path = as_path(source)
    if path.is_dir():
        if cascade_files(path):
            _take(source, options)
            return read_cascade(path, dtype, device, upsampler)
        return read_folder(path, dtype, device, *_take(source, options, "prediction", "variant"))
    if path.is_file() or path.suffix in SUFFIXES:
        return _load_file(path, dtype, device, options)
    if is_id(str(source)):
        prediction, variant = _take(source, options, "prediction", "variant")
        folder = download(str(source), variant)
        with fetched_whole(str(source), folder):
            return read_folder(folder, dtype, device, prediction, variant)
    known = ", ".join((*EMBEDDED, *CASCADES, *FILES))
    raise ModelError(
        f"there is no file or folder {source}; the models known by name are: {known}, and an id of the hub is "
        "owner/name, as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def _load_file(path: Path, dtype: torch.dtype | str | None, device: torch.device, options: dict[str, Any]) -> Model:
    """A single file, by its kind."""
    kind = kind_of(open_tensors(path))
    if kind == CLASSIFIER:
        raise ModelError(f"{path} is {kind}, which draws nothing: it is loaded by models.load_classifier")
    if kind == GLIDE:
        _take(path, options)
        return read_glide(path, dtype, device)
    if kind == GUIDED_DIFFUSION:
        return read_class_model(path, dtype, device, *_take(path, options, "config"))
    return read_single_file(path, dtype, device, *_take(path, options, "prediction"))


def _take(source: str | Path, options: dict[str, Any], *names: str) -> list[Any]:
    """The options of these names. Raises ModelError if any other was given: it has no meaning for this source."""
    if given := [name for name, value in options.items() if value is not None and name not in names]:
        raise ModelError(f"{source} has no use for {' and '.join(given)}: leave it out")
    return [options[name] for name in names]


def save(
    model: Model,
    path: str | Path,
    layout: Literal["diffusers", "single"] = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model as a folder in the diffusers layout, or as a single .safetensors file (one of pixels always, and
    without its upsampler, which is saved by itself).

    Tensors of the loaded file that no network uses go back to the layout that they came from: what went in comes out
    equal. dtype: what the networks' tensors are stored in, None for what they run in. A model folder at `path`, or
    behind it if that is a link, is replaced, and so is a file of a model of pixels by another of its kind. Raises
    ModelError for anything else that is there, for one that holds the working folder, for a released VAE, for weights
    beside the networks' own, as a LoRA's, and for a model that the layout has no place for.
    """
    if layout not in ("diffusers", "single"):
        raise ModelError(f"there is no layout {layout!r}: use 'diffusers' or 'single'")
    _require_own_weights(model)
    if model.released:
        raise ModelError("the VAE was released from memory (release_encoder): load the model again to save it")
    if isinstance(model, LatentModel):
        write = write_folder if layout == "diffusers" else write_single_file
    else:
        write = write_glide if isinstance(model, GlideModel) else write_class_model
    with my_turn:
        write(model, as_path(path), dtype)


def _require_own_weights(model: Model) -> None:
    """Raise ModelError for a network of other weights than its configuration tells of: no one could load it again."""
    classes = {"unet": UNet, "vae": VAE, "text": GlideText if isinstance(model, GlideModel) else ClipText}
    for name, network in model.networks().items():
        usual, found = (
            {weight: tuple(tensor.shape) for weight, tensor in each.state_dict().items()}
            for each in (on_meta(partial(classes[name], network.config)), network)
        )
        if strange := sorted(found.items() - usual.items()) or sorted(usual.items() - found.items()):
            weight, shape = strange[0]
            raise ModelError(
                f"the {name} of {model.source} is not as its configuration tells, by {weight} {shape} for example: "
                "merge layers of your own into its weights, or take them out and save them by themselves"
            )
