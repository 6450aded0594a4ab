"""Filling networks with the tensors of files: strictly, and at the cost of the model's own size.

A network is made on the meta device, where it has names and shapes but no numbers, and its parameters are replaced by
the tensors of the file. Where dtype and device are those of the file, that is the file's own memory map and nothing is
copied. Where they are not, tensors are converted one at a time, and the map is opened anew every few hundred megabytes,
because pages that were read count as used memory until their map is gone.

Every name of the network has to be in the file with its shape, and every name in the file has to be known. What is
published but not used (noise schedules, averaged weights, a last block that does not run) is kept aside, unread.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.errors import ModelError
from models.files import Weights
from models.layout import converted
from models.processor import cpu_has_bfloat16
from models.renaming import Layout, Stored, stored
from models.replacing import replacing

AT_ONCE = 256 * 2**20
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SHOWN = 8
STORED = object()      # no name: nobody else can ask for it


@dataclass(frozen=True)
class Part:
    """A network and how the file that is read names its tensors."""

    network: nn.Module
    layout: Layout

    @cached_property
    def stored(self) -> list[Stored]:
        """The tensors to expect."""
        return stored(self.network, self.layout)


class _Uninitialised(TorchFunctionMode):
    """Leaves new parameters as they are: on the meta device there is nothing to draw, and it takes 1.4 s of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with names and shapes and no memory, frozen, in evaluation mode."""
    with torch.device("meta"), _Uninitialised():
        return make().requires_grad_(False).eval()


def best_layout(parts: Mapping[str, Part], names: Container[str]) -> str:
    """Which of the same network's parts, each of another layout, accounts for most of the names in a file."""
    return max(parts, key=lambda key: sum(entry.name in names for entry in parts[key].stored))


def fill(
    parts: Sequence[Part], weights: Weights, dtype: torch.dtype | str | None, device: torch.device
) -> dict[str, Tensor]:
    """Give networks on the meta device the tensors of a file.

    dtype: of the networks; None for the file's own and "auto" for the best of the device, see `choose_dtype`.
    Returns the unused tensors by the file's names, mapped and unread. Raises ModelError naming every tensor
    that is missing, unknown or of another shape.
    """
    tensors = weights.open()
    unused = _check(parts, tensors, str(weights))
    for part in parts:
        entries = part.stored
        wanted = choose_dtype(dtype, tensors[entries[0].name].dtype, device)
        as_it_is = device.type == "cpu" and all(tensors[entry.name].dtype == wanted for entry in entries)
        state: dict[str, Tensor] = {}
        for some in [entries] if as_it_is else _batches(entries):
            opened = tensors if as_it_is else weights.open({entry.name for entry in some})
            for entry in some:
                ours = entry.split(opened[entry.name])
                state |= {name: converted(tensor, device, wanted) for name, tensor in ours.items()}
            del opened, ours
        part.network.load_state_dict(state, assign=True)
        part.network.requires_grad_(False)
    return {name: tensors[name] for name in unused}


def assign(parts: Sequence[Part], tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Give networks tensors that are in memory, as they are. Returns the unused names; raises as `fill`."""
    unused = _check(parts, tensors, where)
    for part in parts:
        state = {name: t for entry in part.stored for name, t in entry.split(tensors[entry.name]).items()}
        part.network.load_state_dict(state, assign=True)
        part.network.requires_grad_(False)
    return unused


def gather(part: Part, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a network under a layout's names, none on a GPU, in a dtype, or in what the network runs in."""
    state, waits = part.network.state_dict(), getattr(part.network, "runs_in", None)

    def gathered(entry: Stored) -> Tensor:
        tensor = entry.join(state)
        return (tensor.cpu() if tensor.is_cuda else tensor).to(dtype or waits or state[entry.parts[0]].dtype)

    return {entry.name: gathered(entry) for entry in part.stored}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, str] | None = None
) -> None:
    """Write tensors and, as metadata, text beside `path`, and rename: never half a file. The folder is made if need be.

    The file gets the permissions that the user's files usually have; save_file alone keeps it to its owner. Raises
    OSError where nothing can be written, or not all of it: a full disk is no OSError of safetensors'.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as beside:
        beside.touch()
        usual = beside.stat().st_mode
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, beside, {"format": "pt", **(said or {})})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error}): make room, or choose another place") from error
        beside.chmod(usual)


def choose_dtype(wanted: torch.dtype | str | None, found: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a network runs in.

    None: the file's own, but float32 for float16 on a CPU, whose float16 arithmetic is hundreds of times
    slower. "auto": float16 on a GPU; bfloat16 on a CPU that computes in it; else float32. A name such as
    "bfloat16" is as good as the dtype. STORED: the file's own, for weights that only wait on this device.
    Raises ModelError for float16 asked for on a CPU, and for what is no floating dtype of 16 bits or more.
    """
    on_cpu = device.type == "cpu"
    if wanted == "auto":
        return (torch.bfloat16 if cpu_has_bfloat16() else torch.float32) if on_cpu else torch.float16
    if wanted is STORED:
        return found
    if wanted is None:
        return torch.float32 if on_cpu and found == torch.float16 else found
    wanted = FLOATS.get(wanted, wanted)
    if wanted not in FLOATS.values():
        raise ModelError(f"{wanted!r} is no dtype to run a model in: use one of {', '.join(FLOATS)}, or 'auto'")
    if on_cpu and wanted == torch.float16:
        instead = "bfloat16, which this processor has" if cpu_has_bfloat16() else "float32"
        raise ModelError(f"float16 on a CPU runs hundreds of times slower than float32: use {instead}")
    return wanted


def _batches(entries: Iterable[Stored]) -> Iterator[list[Stored]]:
    batch, size = [], 0
    for entry in entries:
        batch.append(entry)
        size += 4 * torch.Size(entry.shape).numel()
        if size > AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check(parts: Sequence[Part], tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """The names in a file that are known but unused; raises ModelError for everything that does not fit."""
    expected = {entry.name: entry for part in parts for entry in part.stored}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    unused = [
        name
        for name in tensors.keys() - expected.keys()
        if any(part.layout.leaves(name, part.network) for part in parts)
    ]
    unknown = tensors.keys() - expected.keys() - set(unused)
    found = expected.keys() & tensors.keys()
    problems = {
        "missing": [f"{name} {expected[name].shape}" for name in expected.keys() - tensors.keys()],
        "not known": [f"{name} {shapes[name]}" for name in unknown],
        "of another shape": [
            f"{name} {shapes[name]}, expected {expected[name].shape}"
            for name in found
            if not expected[name].accepts(shapes[name])
        ],
        f"of another dtype than {', '.join(FLOATS)}": [
            f"{name} {tensors[name].dtype}" for name in found if tensors[name].dtype not in FLOATS.values()
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{_listed(names)} {what}" for what, names in problems.items() if names)
        raise ModelError(f"the weights in {where} do not fit this model: {said}")
    return unused


def _listed(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'}"
