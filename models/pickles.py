"""Reading tensors out of pickles without running what the pickle says.

A pickle is a program: it names functions and has them called. `torch.load(weights_only=True)` refuses every file that
names anything unknown, and the original Stable Diffusion checkpoints name classes of the trainer they came from. Here
three names mean something, the three that put tensors together; every other name becomes an inert class of its own,
which can be called, filled and thrown away, and does nothing. Nothing is imported on the file's word.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from models.errors import ModelError


class Inert:
    """Stands for any class or function that a pickle names. It takes all arguments and keeps its state."""

    state: Any = None

    def __new__(cls, *_args: Any, **_named: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Take an item of a list and forget it."""

    def extend(self, items: Any) -> None:
        """Take the items of a list and forget them."""


class _Rebuild:
    """One of torch's functions that rebuild tensors; without attributes, so that a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return getattr(torch._utils, type(self).__name__)(*args)


ALLOWED: dict[tuple[str, str], Any] = {("collections", "OrderedDict"): OrderedDict} | {
    ("torch._utils", name): type(name, (_Rebuild,), {"__slots__": ()})()
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = ALLOWED.get((module, name))
        return type(name, (Inert,), {"__module__": module}) if allowed is None else allowed


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read_pickle(path: str | Path) -> Any:
    """What a .ckpt, .pt or .bin file holds, tensors memory-mapped where its container allows (all but the oldest).

    Unknown objects come back as `Inert`. Raises ModelError for a file that is no such container, and for a damaged one.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(2)
    is_zip = start == b"PK"
    if not is_zip and start[:1] != b"\x80":
        raise ModelError(
            f"{path} is not a PyTorch file: it begins with {start!r}, neither a zip nor a pickle; take the model as "
            ".safetensors, .ckpt, .pt or .bin"
        )
    if path.suffix == ".safetensors":                               # which torch.load takes at its name
        raise ModelError(f"{path} is a PyTorch file and no .safetensors one: rename it to {path.stem}.ckpt")
    try:
        if is_zip:
            _refuse_program(path)
        # torch derives its own reader from the `Unpickler` of the module that it is given.
        reader = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="restricted")
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False, mmap=is_zip)
    except ModelError:
        raise
    except (RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ModelError(f"{path} cannot be read; it is truncated or damaged ({_first_line(error)})") from error
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, AssertionError) as error:
        raise ModelError(f"{path} does not hold plain tensors ({_first_line(error)})") from error


def _refuse_program(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ModelError(f"{path} is a TorchScript program, not weights: save its state_dict instead")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
