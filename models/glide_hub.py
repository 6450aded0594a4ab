"""Fetching OpenAI's GLIDE files once, into the user's cache: beside their place and renamed, resumed where it broke.

A file counts as fetched only when all of its bytes have come and every tensor has the name and shape of the network
that it should be.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import torch

from models.errors import ModelError
from models.files import Weights
from models.glide import GlideModel
from models.glide_file import read_glide
from models.noisy_clip import NoisyClip, NoisyClipConfig
from models.renaming import Layout
from models.weights import Part, fill, on_meta

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
CASCADES = {"glide": ("base", "upsample"), "glide-inpaint": ("base_inpaint", "upsample_inpaint")}
CLIP = ("clip_text_enc", "clip_image_enc")
CHUNK = 2**20
TIMEOUT = 30  # seconds without a byte


def load_cascade(name: str, dtype: torch.dtype | str | None, device: torch.device) -> GlideModel:
    """The base model of a cascade with its upsampler; arguments as in `models.load`.

    Raises ModelError if a file is neither in the cache nor can be fetched, or is not what it should be.
    """
    base, upsampler = (_checked(path, dtype, device) for path in fetch_all(CASCADES[name]))
    return replace(base, source=name, upsampler=upsampler)


def load_noisy_clip(
    source: str | Path = "glide", dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> NoisyClip:
    """GLIDE's noise-aware CLIP, frozen, for `guidance.clip_gradient`.

    source: "glide", fetched once from OpenAI as `models.load` does, or a folder of clip_text_enc.pt and
    clip_image_enc.pt. dtype, device: as in `models.load`. Raises ModelError for what is not there or does not fit.
    """
    paths = fetch_all(CLIP) if source == "glide" else [Path(source) / f"{part}.pt" for part in CLIP]
    clip = on_meta(lambda: NoisyClip(NoisyClipConfig()))
    for path, encoder in zip(paths, (clip.text_encoder, clip.image_encoder)):
        if not path.is_file():
            raise ModelError(f"there is no {path}: a folder of CLIP holds clip_text_enc.pt and clip_image_enc.pt")
        fill([Part(encoder, Layout())], Weights((path,)), dtype, torch.device(device))
    return clip


def fetch_all(parts: Sequence[str]) -> list[Path]:
    """The files of several networks. Raises ModelError as `fetch`, with the addresses of all that are not there yet."""
    try:
        return [fetch(part) for part in parts]
    except ModelError as error:
        missing = [f"{ADDRESS}/{part}.pt" for part in parts if not (cache() / f"{part}.pt").is_file()]
        raise ModelError(f"{error} (needed in all: {', '.join(missing)})") from error


def cache() -> Path:
    """The folder of fetched files: oneword/glide in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oneword" / "glide"


def fetch(part: str) -> Path:
    """The file of one network, downloaded if it is not there yet; with a progress bar.

    Raises ModelError, with the addresses, if that fails; what has come is kept, and the next call goes on from there.
    """
    path, url = cache() / f"{part}.pt", f"{ADDRESS}/{part}.pt"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        _download(url, beside)
    except OSError as error:  # urllib's errors among them
        raise ModelError(
            f"{path.name} is not in the cache and {url} cannot be fetched ({getattr(error, 'reason', error)}): connect "
            f"to the network and try again, or put the file at {path}"
        ) from error
    os.replace(beside, path)
    return path


def _download(url: str, beside: Path) -> None:
    """Append what is missing of a file. Raises OSError if the connection ends before the file does."""
    from tqdm import tqdm

    have = beside.stat().st_size if beside.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            beside.unlink()  # it is as long as the file or longer, and was not renamed: begin again
            return _download(url, beside)
        raise
    with answer:
        have = have if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
        total = have + int(answer.headers["Content-Length"])
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=beside.stem)
        with open(beside, "ab" if have else "wb") as file, bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if (found := beside.stat().st_size) != total:
        raise OSError(f"the connection ended after {found} of {total} bytes")
    return None


def _checked(path: Path, dtype: torch.dtype | str | None, device: torch.device) -> GlideModel:
    try:
        return read_glide(path, dtype, device)
    except ModelError as error:
        raise ModelError(f"{error}; remove {path} to have it fetched anew") from error
