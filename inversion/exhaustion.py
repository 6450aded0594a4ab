"""A device that runs out of memory: recognised, and answered with what would need less."""

from typing import Any

import torch

SAID = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the forms in which torch, CUDA's libraries and Python say so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def advice(model: Any) -> str:
    """How a model runs, and the next cheaper way, in a sentence."""
    cheaper = model.setting.cheaper(model.device)
    instead = "nothing needs less but a smaller resolution or batch" if cheaper is None else (
        f"the next cheaper setting is checkpointing {cheaper.checkpointing}, offload {cheaper.offload}"
    )  # fmt: skip
    return f"{model.device} ran out of memory with {model.setting}: {instead}"
