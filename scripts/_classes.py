"""A folder of classes: a subfolder each, named after it, of pictures."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from inversion import InversionError, find_images, read_images
from inversion.images import SUFFIXES
from models.class_names import ClassNames


@dataclass(frozen=True)
class Classes:
    """Images (N, 3, size, size) in [-1, 1], the class of each (N,) int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    names: ClassNames

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, which: Tensor) -> "Classes":
        """Some of the pictures. which: a mask (N,) or indices."""
        return Classes(self.images[which], self.labels[which], self.names)


def read_classes(folder: Path, size: int, names: ClassNames | None = None) -> Classes:
    """Every picture of a folder of classes, cropped to a square and resampled.

    names: the classes that there have to be, for a folder of held-out pictures; some may be missing. Raises
    InversionError for fewer than two classes, an empty one, and a file that cannot be read; warns of what is no
    picture, and of pictures that lie in no class.
    """
    if not folder.is_dir():
        raise InversionError(f"there is no folder of classes at {folder}")
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in shown if path.is_dir()]
    if loose := [path.name for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]:
        warnings.warn(f"{loose[0]} and whatever else lies beside the classes of {folder} is left out", stacklevel=2)
    found = ClassNames(tuple(path.name for path in folders))
    if names is None and len(found) < 2:
        raise InversionError(
            f"{folder} holds {len(found)} classes{f', {found}' if len(found) else ''}: at least two are needed, a "
            "subfolder of pictures each"
        )
    if names is not None and (strange := set(found.names) - set(names.names)):
        raise InversionError(f"{folder} has a class {min(strange)} that is none of those to learn: {names}")
    images = [read_images(find_images(path, recursive=True), size) for path in folders]
    names = found if names is None else names
    labels = [torch.full((len(of_one),), names.index(path.name)) for of_one, path in zip(images, folders)]
    if not images:
        raise InversionError(f"{folder} holds no class: a subfolder of pictures each, {names}")
    return Classes(torch.cat(images), torch.cat(labels), names)


def every_tenth(classes: Classes) -> tuple[Classes, Classes]:
    """What is learned from, and what is held out: every tenth picture of each class, at least one.

    Raises InversionError for a class of a single picture.
    """
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    for label, name in enumerate(classes.names.names):
        of_one = (classes.labels == label).nonzero().squeeze(1)
        if len(of_one) < 2:
            raise InversionError(f"the class {name} has one picture, and none to hold out: give it more, or --held-out")
        held_out[of_one[min(9, len(of_one) - 1) :: 10]] = True
    return classes.part(~held_out), classes.part(held_out)


def varied(images: Tensor, amount: float, g: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) mirrored or not, and moved and scaled at random, each for itself; the border is continued.

    amount: up to which part of the side; 0 leaves them as they are, unmirrored too.
    """
    if amount == 0:
        return images
    b = len(images)
    size, mirror = 1 + amount * (2 * torch.rand(b, generator=g) - 1), torch.rand(b, generator=g) < 0.5
    maps = torch.zeros(b, 2, 3)                                                                # output to input
    maps[:, 0, 0], maps[:, 1, 1] = torch.where(mirror, -size, size), size
    maps[:, :, 2] = amount * (2 * torch.rand(b, 2, generator=g) - 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
