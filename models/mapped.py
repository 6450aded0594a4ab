"""Weights that lie in the memory map of their file, and another map of it for as long as they are read.

What was read of a map counts as the process's memory until the map is gone, and what waits is read for a moment only.
So it is read in a map of its own, and its own map stays unread. The system takes such pages back by itself where it
runs short; here they go before it does.
"""

import bisect
import os
from dataclasses import dataclass
from pathlib import Path

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
        lines = os.fsdecode(MAPS.read_bytes()).splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    found = [(*each[0].split("-"), each[2], each[4], each[5]) for each in fields if len(each) == 6]
    return [FileMap(int(a, 16), int(b, 16), int(at, 16), int(node), path) for a, b, at, node, path in found]


class Mapped:
    """A weight, and where in a file it lies, if it does. maps: from `file_maps`, taken while the weight was there."""

    def __init__(self, weight: Tensor, maps: list[FileMap]) -> None:
        self.weight, self.map = weight, None
        plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"       # a plan's lie nowhere
        if plain and maps and not (weight.is_inference() or weight.requires_grad):
            first = weight.data_ptr()
            near = maps[bisect.bisect_right(maps, first, key=lambda each: each.first) - 1]
            self.at, rest = divmod(near.offset + first - near.first, weight.itemsize)
            self.end = self.at + 1 + sum((n - 1) * stride for n, stride in zip(weight.shape, weight.stride()))
            if near.first <= first and first + (self.end - self.at) * weight.itemsize <= near.last and not rest:
                self.map, self.version = near, weight._version

    def anew(self) -> Tensor:
        """The same numbers in a map that ends with this tensor.

        The weight itself where that could not be the same: it lies in no file, was changed in place, or another file has
        taken the name.
        """
        if self.map is None or self.weight._version != self.version:
            return self.weight
        try:
            if os.stat(self.map.path).st_ino != self.map.inode:
                return self.weight
            storage = torch.UntypedStorage.from_file(self.map.path, False, self.end * self.weight.itemsize)
        except (OSError, RuntimeError):                                                      # gone, or cut short
            return self.weight
        return torch.empty(0, dtype=self.weight.dtype).set_(storage, self.at, self.weight.shape, self.weight.stride())
