"""Which device a network goes to."""

import re

import torch

from models.errors import ModelError


def choose_device(device: torch.device | str | None, must_be_there: bool = True) -> torch.device:
    """The device that was asked for, the GPU if none was and there is one. Raises ModelError for one that is not there,
    and for a GPU that this torch has no kernels for.

    must_be_there: False for a GPU that is only planned for.
    """
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"there is no device {device!r}: use cpu, or cuda for an NVIDIA GPU") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"models run on cpu and on cuda, not on {device.type}")
    if device.type == "cpu" or not must_be_there:
        return device
    if not has_gpu:
        built = "a newer driver of the GPU" if torch.version.cuda else "a CUDA build of torch"
        raise ModelError(f"device cuda was asked for, but this torch sees no GPU: use cpu, or {built}")
    return _numbered(device)


def _numbered(device: torch.device) -> torch.device:
    """A GPU by its number, so that it stays the same one whichever is torch's current one later.

    Raises ModelError for one that is not there, and for one older than all that this torch has kernels for.
    """
    count, index = torch.cuda.device_count(), torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ModelError(f"there is no device cuda:{index}: torch sees {count} GPU{'s' * (count > 1)}, from cuda:0 on")
    kernels = [int(name[3:]) for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)]   # none by ROCm
    major, minor = torch.cuda.get_device_capability(index)
    if kernels and 10 * major + minor < min(kernels):
        raise ModelError(
            f"this torch has no kernels for cuda:{index}, {torch.cuda.get_device_name(index)}, which is of compute "
            f"capability {major}.{minor}: use cpu, or a torch that was built for it"
        )
    return torch.device("cuda", index)
