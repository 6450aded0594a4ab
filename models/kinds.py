"""Which of the published kinds a file of tensors is: their names tell."""

from collections.abc import Iterable
from typing import NamedTuple


class Kind(NamedTuple):
    """name: as code asks for it. words: as a sentence calls it."""

    name: str
    words: str


STABLE_DIFFUSION = Kind("stable-diffusion", "a Stable Diffusion checkpoint")
GLIDE = Kind("glide", "one of GLIDE's networks")
GUIDED_DIFFUSION = Kind("guided-diffusion", "a UNet of guided-diffusion")
CLASSIFIER = Kind("classifier", "a classifier of guided-diffusion")
UNKNOWN = Kind("unknown", "none of the kinds of file known here")

STEM = "input_blocks.0.0.weight"
GLIDE_TEXT = {"padding_embedding", "transformer_proj.weight"}


def kind_of(names: Iterable[str]) -> Kind:
    """The kind of a file whose tensors have these names."""
    names = set(names)
    if any(name.startswith("model.diffusion_model.") for name in names):
        return STABLE_DIFFUSION
    if STEM not in names:
        return UNKNOWN
    if names >= GLIDE_TEXT:
        return GLIDE
    return GUIDED_DIFFUSION if any(name.startswith("output_blocks.") for name in names) else CLASSIFIER
