"""Reading learned-embedding files of every format found in the wild; writing the one that all tools read.

| written by                  | keys                                         | the word                      |
|-----------------------------|----------------------------------------------|-------------------------------|
| diffusers, this library     | the placeholder itself                       | the key                       |
| AUTOMATIC1111 (`.pt`)       | string_to_token, string_to_param {'*'}, name | `name`                        |
| AUTOMATIC1111 (`.png`)      | the same, as base64 of JSON in a text chunk  | `name`                        |
| kohya, invoke-training      | emb_params                                   | none inside: the file's stem  |
| rinongal/textual_inversion  | string_to_param, a torch.nn.ParameterDict    | none inside: the file's stem  |
| SDXL tools, for one encoder | clip_l                                       | none inside: the file's stem  |
| SDXL tools                  | clip_l, clip_g                               | refused: two encoders         |

Nothing in a file is executed: pickles are read with torch's restricted unpickler, and `torch.nn.ParameterDict` is the
one class added to what it allows. A file with one tensor is what diffusers, AUTOMATIC1111, ComfyUI and InvokeAI all
accept (a second tensor breaks two of them), so all else is written into the safetensors metadata.

The picture's format is that of modules/textual_inversion/image_embedding.py, AUTOMATIC1111/stable-diffusion-webui at
011bac4; a second copy, in the pixels of its borders, is not read.
"""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from inversion.errors import InversionError
from models.files import is_safetensors
from models.kinds import UNKNOWN, WORD, kind_of
from models.replacing import replacing

NAMELESS = ("emb_params", "clip_l")     # keys that are no word
ENDINGS = (".safetensors", ".pt", ".bin", ".png")
PNG, PNG_TEXT = b"\x89PNG\r\n", "sd-ti-embedding"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
REPEATED = 2**24        # bytes that may be told by fewer in a file, as several equal vectors are


def read_embeddings(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every learned word of a file, and what the file says about itself.

    Returns ({word: (n, D) float32 on the CPU, finite}, metadata). Raises InversionError for what is missing,
    damaged, made for several text encoders, or not an embedding.
    """
    if not path.is_file():
        raise InversionError(f"there is no embedding file at {path}")
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"version "):
        raise InversionError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`, or anew")
    if head.startswith(PNG):
        content, metadata = _read_png(path), {}
    else:
        content, metadata = _read_safetensors(path) if is_safetensors(path) else _read_pickle(path)
    if isinstance(content, Mapping) and (kind := kind_of(map(str, content))) not in (UNKNOWN, WORD):
        raise InversionError(f"{path} is {kind}: a learned word is a file of vectors alone")
    named, said = _named(content, path)
    words = {word: _vectors(value, word, path) for word, value in named.items()}
    widths = sorted({vectors.shape[1] for vectors in words.values()})
    if len(widths) > 1:
        raise InversionError(
            f"{path} holds {len(words)} tensors of widths {', '.join(map(str, widths[:8]))}, and the words of one "
            "model have one: it was made for several text encoders, as those of SDXL, or holds a LoRA or other "
            "weights; use a learned word of Stable Diffusion 1.x or 2.x"
        )
    return words, metadata | said


def write_embedding(path: Path, word: str, vectors: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write one tensor, (n, D) float32, under the key `word`, beside the target, and rename: never half a file.

    The folder is made if need be. `format: pt` is added to the metadata, which some readers insist on. Raises
    InversionError as `require_name`.
    """
    require_name(path)
    with replacing(path) as beside:
        said = {str(key): str(value) for key, value in metadata.items()} | {"format": "pt"}
        beside.write_bytes(save({word: vectors.detach().cpu().contiguous()}, said))


def require_writable(folder: Path, what: str) -> None:
    """Raise InversionError unless a folder, or the one that it would be made in, can be written to.

    what: that should be chosen otherwise if it cannot.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    is_a = "read-only" if above.is_dir() else "a file"
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InversionError(f"nothing can be written to {folder}, {above} being {is_a}: choose another {what}")


def require_place(path: Path) -> None:
    """Raise InversionError for a file that a learned word cannot be written to, before hours are spent on it."""
    require_name(path)
    if path.is_dir():
        raise InversionError(f"{path} is a folder: name a file, such as {path / 'word.safetensors'}")
    require_writable(path.absolute().parent, "file")


def require_name(path: Path) -> None:
    """Raise InversionError for a file that would be called as pickles are, which other tools then take it for."""
    if path.suffix.lower() in PICKLES:
        raise InversionError(
            f"{path} is named as a pickle, and learned words are written as safetensors: call it "
            f"{path.with_suffix('.safetensors').name}"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise InversionError(f"{path} is damaged or cut short ({error}): download it again") from error


def _read_png(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_TEXT)
        content = None if text is None else json.loads(base64.b64decode(text), object_hook=_tensor_of_json)
    except Exception as error:  # a foreign file may fail in any way at all
        raise InversionError(f"{path} is damaged or cut short ({error}): download it again") from error
    if content is None:
        raise InversionError(
            f"{path} is a picture without an embedding (in a text called {PNG_TEXT}): many sites take that out of the "
            "pictures they show; download the file itself"
        )
    return content


def _tensor_of_json(part: dict[str, Any]) -> Any:
    is_tensor = part.keys() == {"TORCHTENSOR"}
    return torch.tensor(part["TORCHTENSOR"], dtype=torch.float32, device="cpu") if is_tensor else part


def _read_pickle(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # a foreign file may fail in any way at all
        raise InversionError(
            f"{path} cannot be read as plain tensors: it is damaged, no embedding file, or holds objects that would "
            "have to be run, which nothing here does"
        ) from error


def _named(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by word, and what the format says beside them."""
    if not isinstance(content, Mapping) or not content:
        raise InversionError(f"{path} holds no learned embedding: a {type(content).__name__} was found")
    if "clip_g" in content:
        raise InversionError(
            f"{path} was made for SDXL, with two text encoders (clip_l, clip_g); the models here have one: "
            "use a file made for Stable Diffusion 1.x or 2.x"
        )
    if "string_to_param" in content:
        params = content["string_to_param"]
        if not isinstance(params, Mapping | torch.nn.ParameterDict) or not len(params):
            raise InversionError(f"{path} is no embedding file: its string_to_param holds no vectors by name")
        params = {str(key): value for key, value in params.items()}
        name = content.get("name")
        if len(params) == 1:
            params = {name if isinstance(name, str) and name else path.stem: next(iter(params.values()))}
        known = {"steps": "step", "source": "sd_checkpoint_name"}
        return params, {
            ours: str(content[key]) for ours, key in known.items() if content.get(key) is not None
        }
    return {path.stem if key in NAMELESS else str(key): value for key, value in content.items()}, {}


def _vectors(value: Any, word: str, path: Path) -> Tensor:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.ndim not in (1, 2) or not value.is_floating_point():
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            found += f" of {value.dtype}" if plain else f" of {value.layout} on {value.device}"
        raise InversionError(f"{path} is no embedding file: {word!r} is {found}, not vectors (n, D) of floats")
    if value.nbytes > max(REPEATED, value.untyped_storage().nbytes()):      # one number may be told as billions
        raise InversionError(f"{path} is damaged: {word!r} is {tuple(value.shape)}, more numbers than the file holds")
    rows = (value if value.ndim == 2 else value[None]).detach()
    vectors = rows.to(torch.float32, copy=True).contiguous()    # no part of the memory map, which changes with the file
    if not vectors.numel() or not vectors.isfinite().all():
        raise InversionError(
            f"the vectors of {word!r} in {path} are empty or not finite: the training that made them failed"
        )
    return vectors
