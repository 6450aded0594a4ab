"""Finding and opening the files that hold tensors.

Opening maps a file into memory and reads no tensor: what is never looked at never costs memory, and what is
looked at can be dropped again by the system, since it lies unchanged on the disk. A file must therefore stay
as it is while a model that was loaded from it is in use; replacing it by renaming is safe.
"""

import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.errors import ModelError
from models.pickles import read_pickle

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


def as_path(path: str | Path) -> Path:
    """A path in which ~ is the user's home: no shell puts that there in --output=~/x, and no notebook at all."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True)
class Weights:
    """The tensors of one part of a model, in one file or in several shards; none is read before `open`."""

    files: tuple[Path, ...]

    def open(self, only: Container[str] | None = None) -> dict[str, Tensor]:
        """Every tensor by its name, or only those of some names, mapped anew. Raises ModelError as `open_tensors`."""
        return {key: tensor for file in self.files for key, tensor in open_tensors(file, only).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name. Raises ModelError as `open_tensors`."""
        return {name: tuple(tensor.shape) for name, tensor in self.open().items()}

    def names(self) -> set[str]:
        """The name of every tensor, of which none is mapped. Raises ModelError as `open_tensors`."""
        return {name for file in self.files for name in tensor_names(file)}

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def open_tensors(path: str | Path, only: Container[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle (.ckpt, .pt, .bin), by name, mapped into memory.

    only: names, if not all are wanted. Which of the two a file is, it tells itself: they are known by wrong names, too.
    A `state_dict` around the tensors is taken off; what is not a tensor is left out. Raises ModelError for a
    file that is missing, truncated, a git-lfs pointer, or something else.
    """
    path = Path(path)
    refuse_unreadable(path)
    if is_safetensors(path):
        return _open_safetensors(path, only)
    content = read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not tensors by name")
    # .data, not detach(): unpickling counts as a change in place, and `mapped` asks whether there was one
    found = {str(key): value.data for key, value in content.items() if isinstance(value, Tensor)}
    return {key: tensor for key, tensor in found.items() if only is None or key in only}


def tensor_names(path: Path) -> set[str]:
    """The names that `open_tensors` gives, and what it raises."""
    refuse_unreadable(path)
    if not is_safetensors(path):
        return set(open_tensors(path))
    with _safetensors(path) as file:
        return set(file.keys())


def refuse_unreadable(path: Path) -> None:
    """Raise ModelError for a file that is missing or empty, or a git-lfs pointer or a web page left in its place."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ModelError(f"{path} is a web page: download the file itself, logged in if its site wants that")
    if not start:
        raise ModelError(f"{path} is empty")


def is_safetensors(path: Path) -> bool:
    """Whether a file is a .safetensors one, by what it holds: JSON after the length of a header; else by its name."""
    with open(path, "rb") as file:
        start = file.read(9)
    pickled = start[:2] == b"PK" or start[:1] == b"\x80"
    return start[8:] == b"{" or path.suffix == ".safetensors" and not pickled


def metadata(path: Path) -> dict[str, str]:
    """The text that a .safetensors file carries beside its tensors; no other file has any."""
    if not is_safetensors(path):
        return {}
    with _safetensors(path) as file:
        return file.metadata() or {}


def _open_safetensors(path: Path, only: Container[str] | None) -> dict[str, Tensor]:
    with _safetensors(path) as file:
        names = file.keys()                                             # it is no mapping
        return {key: file.get_tensor(key) for key in names if only is None or key in only}


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """The file, open. Raises ModelError for one that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read; it is truncated or damaged ({error})") from error


def find_weights(folder: Path, stems: Iterable[str], variant: str | None) -> Weights:
    """The weight files of a folder: .safetensors before .bin, one file before shards, only of the variant asked for.

    stems: names without suffix, such as "diffusion_pytorch_model". Raises ModelError naming what was looked
    for, and the variants that are there instead.
    """
    stems = tuple(stems)
    kinds = [(stem, suffix) for suffix in ("safetensors", "bin") for stem in stems]
    looked_for = [name for stem, suffix in kinds for name in weight_names(stem, suffix, variant)]
    for name in looked_for:
        if (folder / name).is_file():
            return Weights(_shards(folder / name) if name.endswith(".json") else (folder / name,))
    raise ModelError(f"{folder} holds none of {', '.join(looked_for)}{_other_variants(folder, stems, variant)}")


def weight_names(stem: str, suffix: str, variant: str | None) -> tuple[str, str]:
    """The names of a weight file and of an index of shards: model.fp16.safetensors, model.safetensors.index.fp16.json.
    """
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of shards: it needs a weight_map of file names") from error
    for shard in shards:
        if not isinstance(shard, str) or re.search(r"[/\\]|^\.\.?$|^$", shard):
            raise ModelError(f"{index} names {shard!r} as a shard; a shard is a bare file name in the same folder")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ModelError(f"{index.parent} lacks the shard {', '.join(missing)} that {index.name} names")
    return tuple(index.parent / shard for shard in shards)


def _other_variants(folder: Path, stems: tuple[str, ...], variant: str | None) -> str:
    stem = "|".join(map(re.escape, stems))
    pattern = re.compile(rf"(?:{stem})(?:\.([\w]+))?\.(?:safetensors|bin)(?:\.index(?:\.([\w]+))?\.json)?")
    found = {m[1] or m[2] for file in folder.glob("*") if (m := pattern.fullmatch(file.name))} - {variant}
    said = ["no variant" if other is None else f"variant={other!r}" for other in sorted(found, key=str)]
    return f"; it does hold {', '.join(said)}" if said else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of entries by name. Raises ModelError for a file that holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not entries by name")
    return content
