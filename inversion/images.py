"""Photographs as the trainer wants them: upright, square, of one size, in memory.

A camera stores its picture as the sensor lay and notes the turn in EXIF; here it is turned. A photograph is cropped to
the largest centred square, never squashed, and resampled with Lanczos's filter. Transparent pixels lie on white.
Nothing is mirrored: that ruins what is not symmetric, and is the caller's to ask for. All files are decoded before
anything else happens, so that a damaged one is met in the first second and not in the second epoch.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from inversion.errors import InversionError
from models.files import as_path

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
HEIC, HEIC_BRANDS = {".heic", ".heif"}, {b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc"}
EXPORTED = "Pillow does not read those: export them as JPEG"
NOBODY_S = {".DS_Store", "Thumbs.db", "desktop.ini"}    # what systems leave in a folder that was looked at
SMALLEST_SIDE = 16  # below this there is nothing to learn from: an icon in a favicon has 16
SHOWN = 8  # names in a message
ENLARGED = 2  # a side enlarged by more than this factor is worth a word


def read_folder(folder: str | Path, size: int, recursive: bool = False) -> Tensor:
    """Every image of a folder, in the order of their names.

    Returns (N, 3, size, size) float32 in [-1, 1]. Warns and raises as `find_images` and `read_images` do.
    """
    return read_images(find_images(folder, recursive), size)


def find_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder (with `recursive`, of its subfolders too), in the order of their names.

    Hidden and foreign files are left out with one warning that names them; captions (a .txt beside an image of the same
    stem) are no foreign files, and what the system itself puts there is not named. Raises InversionError for a folder
    that is missing, a file, empty, or has no image.
    """
    folder = as_path(folder)
    if folder.is_file():
        raise InversionError(f"{folder} is a file: name the folder that holds the images")
    if not folder.is_dir():
        raise InversionError(f"there is no folder of images at {folder}")
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    if not found:
        raise InversionError(f"the folder {folder} is empty: put the images to learn from into it")
    files = [file for file in found if not (recursive and file.is_dir())]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    images = [file for file in shown if file.suffix.lower() in SUFFIXES and file.is_file()]
    captions = {image.with_suffix(".txt") for image in images}
    foreign = [str(file.relative_to(folder)) for file in files if file not in captions and file not in images]
    foreign = [name for name in foreign if Path(name).name not in NOBODY_S]
    readable = f"readable are {', '.join(sorted(SUFFIXES))}"
    if any(Path(name).suffix.lower() in HEIC for name in foreign):
        readable += f"; HEIC photographs are not, and {EXPORTED}"
    if any(file.is_dir() for file in shown):
        readable += "; folders in it are not searched: name one of them, or move its images up"
    if not images:
        raise InversionError(f"the folder {folder} holds no readable image, only {_listed(foreign)}: {readable}")
    if foreign:
        said = f"skipped in {folder}, no readable image: {_listed(foreign)}; {readable}"
        warnings.warn(said, UserWarning, stacklevel=2)
    return images


def read_images(files: Sequence[str | Path], size: int) -> Tensor:
    """Decode, turn, crop and resample.

    Returns (N, 3, size, size) float32 in [-1, 1]. One warning names the images that are enlarged more than
    twofold. Raises InversionError for a file that is damaged, or smaller than 16 pixels on a side, for a path in
    the place of a list, for a list of none, and for a size below 1.
    """
    if isinstance(files, (str, Path)):
        raise InversionError(f"images are read from a list of files: take find_images({str(files)!r})")
    if not files:
        raise InversionError("there are no images to read: the list of files is empty")
    if size < 1:
        raise InversionError(f"images of {size} pixels a side cannot be made: size is at least 1")
    pixels, small = [], []
    for file in map(as_path, files):
        image = decode(file)
        side = min(image.size)
        if side < SMALLEST_SIDE:
            raise InversionError(
                f"{file} has only {image.width}×{image.height} pixels: there is nothing to learn in it: "
                "remove it, or put a larger one in its place"
            )
        if side * ENLARGED < size:
            small.append(f"{file.name} ({image.width}×{image.height})")
        pixels.append(torch.from_numpy(np.asarray(_square(image, size)).copy()))  # (size, size, 3)
    if small:
        warnings.warn(f"enlarged to {size}×{size}, and so blurred: {_listed(small)}", UserWarning, stacklevel=2)
    return torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def decode(file: Path) -> "Image":
    """One file, turned upright, as RGB over white. Raises InversionError for one that is missing or damaged, and
    OSError for one that the system does not let read.
    """
    from PIL import Image, ImageOps

    if not file.is_file():
        raise InversionError(f"there is no image at {file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # of what is opened all the same
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image)  # a copy, which decodes the file
    except Image.UnidentifiedImageError as error:
        if _is_heic(file):
            raise InversionError(f"{file} is a HEIC photograph, whatever its name, and {EXPORTED}") from error
        raise InversionError(
            f"{file} is damaged or cut short, or no image at all: copy it again, or name another"
        ) from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise InversionError(f"{file} has more than {most} pixels, and is not opened: make it smaller") from error
    except Exception as error:  # decoders of some twenty formats fail in their own ways
        if isinstance(error, OSError) and error.errno is not None:      # the system's: it cannot be read
            raise
        raise InversionError(f"{file} is damaged or cut short ({error}): remove it, or copy it again") from error
    if image.mode == "F":
        raise InversionError(f"{file} holds floating-point pixels, of unknown white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to white
        pixels = np.asarray(image).astype(np.float64)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 65535 or image.mode == "I" and high <= 255:        # 8 bits in 32 would be nearly black
            raise InversionError(
                f"{file} holds pixels of {low:.0f} to {high:.0f}, of unknown white: save it with 8 or 16 bits"
            )
        if "transparency" in image.info:                # a PNG's one grey that is none
            pixels[pixels == image.info["transparency"]] = 65535
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_heic(file: Path) -> bool:
    with open(file, "rb") as content:
        start = content.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS


def _square(image: "Image", size: int) -> "Image":
    """The largest centred square, resampled."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
