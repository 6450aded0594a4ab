"""A device that runs out of memory: recognised, and answered with what would need less."""

import errno
import traceback
from typing import Any

import torch

from inversion.plan import one_by_one
from models import GlideModel, LatentModel, Setting

SAID = (
    "out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED",
    "failed to map segment",                                # of a library that is loaded when it is first needed
    "unable to find an engine", "STATUS_NOT_INITIALIZED",   # cuDNN without room for its workspace; CUDA's for a handle
)  # fmt: skip
ONEDNN_SAID = "could not create a primitive"                # and no more; of what does not fit together it says more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the forms in which torch, oneDNN, CUDA's libraries, Python and the system say so."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, (RuntimeError, ImportError)):
        return isinstance(error, MemoryError)
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or said == ONEDNN_SAID or any(words in said for words in SAID)


def let_go(error: BaseException) -> None:
    """Free what the frames of an error's traceback, and of those that led to it, hold: in a notebook, which keeps the
    error, the next try would find the memory full of this one's.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def advice(model: Any, side: int, batch_size: int) -> str:
    """How a model trains, and the next cheaper way, in a sentence. side: of the images; batch_size: samples at once."""
    cheaper = next_cheaper(model, side, batch_size)
    instead = "nothing needs less but a smaller resolution or batch" if cheaper is None else (
        f"the next cheaper setting is checkpointing {cheaper.checkpointing}, offload {cheaper.offload}"
    )  # fmt: skip
    if model.device.type == "cuda" and model.dtype == torch.float32:
        instead += "; dtype float16 takes half the memory"
    return f"{model.device} ran out of memory with {model.setting}: {instead}"


def next_cheaper(model: Any, side: int, batch_size: int) -> Setting | None:
    """The first of the settings after a model's own, each slower than the one before, whose planned peak is lower."""
    settings = [model.setting]
    while (following := settings[-1].cheaper()) is not None:
        settings.append(following)
    if len(settings) == 1 or not isinstance(model, LatentModel | GlideModel):
        return model.setting.cheaper()
    try:
        planned = one_by_one(model, side, batch_size, "cpu" if model.device.type == "cpu" else "cuda", settings)
        now = next(planned)
        return next((each.setting for each in planned if each.peak < now.peak), None)
    except Exception:               # larger than any plan; or no memory is left to plan in, which shows in many ways
        return model.setting.cheaper()
