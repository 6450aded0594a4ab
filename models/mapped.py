"""Weights that lie in the memory map of their file, and another map of it for as long as they are read.

What was read of a map counts as the process's memory until the map is gone, and what waits is read for a moment only.
So it is read in a map of its own, and its own map stays unread. The system takes such pages back by itself where it
runs short; here they go before it does.
"""

import bisect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAPS = Path("/proc/self/maps")      # Linux's; elsewhere every weight counts as one that lies in no file


@dataclass(frozen=True)
class FileMap:
    """A file's bytes from an offset on, in memory from one address to another."""

    first: int
    last: int
    offset: int
    inode: int
    path: str


def file_maps() -> list[FileMap]:
    """This process's maps of files, by address."""
    try:
        lines = MAPS.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for fields in (line.split(maxsplit=5) for line in lines):
        if len(fields) == 6 and fields[5].startswith(b"/"):
            first, last = (int(address, 16) for address in fields[0].split(b"-"))
            found.append(FileMap(first, last, int(fields[2], 16), int(fields[4]), os.fsdecode(fields[5])))
    return found


class Seen:
    """A weight as it is now, to tell later whether it was changed, or another has taken its place.

    It keeps the numbers in memory, whose address another weight could otherwise get. Inference tensors do not count
    their changes, and what is done behind autograd's back, as by `weight.data.mul_(2)`, is not counted.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        if _tells(weight):
            self.version, self.first, self.numbers = weight._version, weight.data_ptr(), weight.untyped_storage()

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, (self.weight,)         # what is copied or read from a pickle is seen then

    def is_still(self, weight: Tensor) -> bool:
        """Whether that is the same weight, unchanged."""
        if weight is not self.weight or not _tells(weight):
            return weight is self.weight
        return weight._version == self.version and weight.data_ptr() == self.first


class Mapped:
    """A weight, and where in a file it lies, if it does. maps: from `file_maps`, taken while the weight was there."""

    def __init__(self, weight: Tensor, maps: list[FileMap]) -> None:
        self.weight, self.seen, self.path = weight, Seen(weight), None
        if not (maps and _tells(weight)) or weight.device.type != "cpu" or weight._version or weight.requires_grad:
            return
        first = weight.data_ptr()
        near = maps[bisect.bisect_right(maps, first, key=lambda each: each.first) - 1]
        self.at, rest = divmod(near.offset + first - near.first, weight.itemsize)
        self.end = self.at + 1 + sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride()))
        inside = near.first <= first and first + (self.end - self.at) * weight.itemsize <= near.last
        self.file = _identity(near.path)
        if inside and not rest and self.file is not None and self.file[1] == near.inode:
            self.path = near.path

    def __reduce__(self) -> tuple[Any, ...]:
        return Mapped, (self.weight, [])    # a copy of the weight lies in no file

    def anew(self) -> Tensor:
        """The same numbers in a map that ends with this tensor.

        The weight itself where that could not be the same: it lies in no file, was changed (see `Seen`), or another
        file has taken the name.
        """
        if self.path is None or not self.seen.is_still(self.weight) or _identity(self.path) != self.file:
            return self.weight
        try:
            storage = torch.UntypedStorage.from_file(self.path, False, self.end * self.weight.itemsize)
        except RuntimeError:                                                                 # gone, or cut short
            return self.weight
        return self.weight.new_empty(0).set_(storage, self.at, self.weight.shape, self.weight.stride())


def mapped(groups: Iterable[Iterable[Tensor]], device: torch.device) -> list[list[Mapped]]:
    """Weights that wait for a device; if that is their own, they are read in maps that go again."""
    maps = file_maps() if device.type == "cpu" else []
    return [[Mapped(weight, maps) for weight in weights] for weights in groups]


def _tells(weight: Tensor) -> bool:
    """Whether a tensor has a place and counts its changes: not one of a plan's, for example."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the file that has a name now."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
