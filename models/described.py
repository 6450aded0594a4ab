"""Single .safetensors files that describe their network themselves, as JSON in the metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from models.errors import OF_WRONG_KINDS, ModelError
from models.files import metadata
from models.unet import UNetConfig
from models.weights import write_safetensors

Described = TypeVar("Described")


def described(path: Path, key: str, read: Callable[[dict[str, Any]], Described]) -> Described | None:
    """What `read` makes of the description in a file, None for a file that has none under this key.

    read: best makes the network, too, so that numbers that make none are met here. Raises ModelError for a description
    that it can make nothing of.
    """
    said = metadata(path).get(key)
    if said is None:
        return None
    try:
        return read(json.loads(said))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except OF_WRONG_KINDS as error:
        raise ModelError(f"the metadata of {path} does not describe a network of {key} ({error})") from error


def unet_config(said: Mapping[str, Any]) -> UNetConfig:
    """A UNetConfig that went through JSON, which knows no tuples."""
    return UNetConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})


def require(said: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise TypeError unless these entries are of these types, KeyError without one; an int is a size, 1 or more."""
    for key, kind in kinds.items():
        if type(said[key]) is not kind or (kind is int and said[key] < 1):
            raise TypeError(f"{key} is {said[key]!r}")
    if "steps" in said.get("schedule", ()):
        require(said["schedule"], {"steps": int})


def write_described(path: Path, key: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and description beside `path` and rename them into place; another of this kind is replaced.

    Raises ModelError for a path that is taken by anything else, or is no .safetensors.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"a network that describes itself is written as .safetensors; {path} ends in {path.suffix!r}")
    if path.exists() and not (path.is_file() and key in metadata(path)):
        raise ModelError(f"{path} exists: choose another path, or remove it")
    write_safetensors(path, tensors, {key: json.dumps(said)})
