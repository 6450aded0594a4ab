"""Which device a network goes to."""

import torch

from models.errors import ModelError


def choose_device(device: torch.device | str | None, must_be_there: bool = True) -> torch.device:
    """The device that was asked for, the GPU if none was and there is one. Raises ModelError for one that is not.

    must_be_there: False for a GPU that is only planned for.
    """
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"there is no device {device!r}: use cpu, or cuda for an NVIDIA GPU") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"models run on cpu and on cuda, not on {device.type}")
    if device.type == "cuda" and not has_gpu and must_be_there:
        raise ModelError("device cuda was asked for, but this torch sees no GPU: use cpu, or a CUDA build of torch")
    return device
