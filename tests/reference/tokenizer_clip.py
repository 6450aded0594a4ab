"""The reference case `tokenizer_clip`: the ids of awkward strings under CLIP's vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.tokenizer import ClipTokenizer


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (text, our ids (L,), the reference's) for every text of the case."""
    tokenizer = ClipTokenizer.clip(length=len(config["cases"][0]["ids"]))
    for case in config["cases"]:
        yield repr(case["text"]), tokenizer.encode([case["text"]]).ids[0], torch.tensor(case["ids"])
