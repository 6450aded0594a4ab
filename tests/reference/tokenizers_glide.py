"""The reference case `tokenizers_glide`: the ids of awkward strings under GLIDE's tokenizer and its CLIP's."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.glide_tokenizer import GlideTokenizer
from models.noisy_clip import tokenizer


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (text, our ids, the reference's) for every text of either tokenizer."""
    glide, clip = GlideTokenizer.gpt2(), tokenizer()
    for case in config["glide_bpe"]["cases"]:
        tokens = glide.encode([case["text"]])
        yield f"glide {case['text']!r}", tokens.ids[tokens.mask], torch.tensor(case["ids"])
    for case in config["glide_clip_bpe"]["cases"]:
        yield f"clip {case['text']!r}", torch.tensor(clip.tokens_of(case["text"])), torch.tensor(case["ids"])
    for case in config["glide_clip_bpe"]["padded"]:
        yield f"clip, padded {case['text']!r}", clip.encode([case["text"]]).ids[0], torch.tensor(case["tokens"])
