"""What a diffusion model learns from: images, and a row each with what the network is told beside them."""

import json
from pathlib import Path

import numpy as np
import torch
from _classes import read_classes
from torch import Tensor
from torch.nn import functional

from inversion import read_folder
from inversion.images import decode
from models import ModelError
from models.class_names import ClassNames


def read_told(told: str, folder: Path, size: int | None, names: ClassNames | None = None) -> tuple[Tensor, list[dict]]:
    """Images (N, 3, H, W) in [-1, 1] of a folder, and a row each with what the network is told: its "captions".

    told: "captions", "classes" or "nothing"; size as in train_diffusion.py. names: the classes that a folder of
    held-out pictures may have. Raises ModelError and InversionError for a folder that is none of that kind.
    """
    if told == "captions":
        return read_captioned(folder, size)
    if size is None:
        raise ModelError(f"a model told {told} needs the --size of its pictures")
    if told == "nothing":
        images = read_folder(folder, size, recursive=True)
        return images, [{"name": "", "captions": [""]}] * len(images)
    classes = read_classes(folder, size, names)
    named = [classes.names.names[label] for label in classes.labels.tolist()]
    return classes.images, [{"name": name, "captions": [name]} for name in named]


def read_captioned(folder: Path, size: int | None = None) -> tuple[Tensor, list[dict]]:
    """Images (N, 3, H, W) in [-1, 1] of a folder, all of one size, and the rows of captions.jsonl.

    They are decoded as photographs are: turned upright, over white. Raises ModelError for captions or sizes
    that cannot be used, and InversionError for an image that cannot be read.
    """
    file = folder / "captions.jsonl"
    if not file.is_file():
        raise ModelError(f"{folder} has no captions.jsonl: name a folder that make_emoji_data.py wrote")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        forms = {len(row["captions"]) for row in rows if row["file"] and row["name"]}
        if any(isinstance(row["captions"], str) for row in rows):
            raise TypeError("captions are a list, of one if there is one")    # or its letters would be the captions
        texts = [text for row in rows for text in (row["file"], row["name"], *row["captions"])]
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"{strange[0]!r} is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f'a line of {file} is not {{"file": "...", "name": "...", "captions": ["..."]}} ({error})'
        ) from error
    if len(forms) != 1 or not min(forms):
        raise ModelError(f"{file}: every image needs equally many captions, at least one; found {sorted(forms)}")
    pixels = [np.asarray(decode(folder / row["file"])) for row in rows]
    if len(sizes := {picture.shape[:2] for picture in pixels}) > 1:
        raise ModelError(f"the images of {folder} have different heights and widths, {sorted(sizes)}: use one")
    (height, width), = sizes
    if height != width or height < (size or 1):
        raise ModelError(
            f"the images of {folder} have {width}x{height} pixels: cut them square, at least as large as --size"
        )
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    return images if size is None else functional.adaptive_avg_pool2d(images, size), rows
