"""A model of classes, or of nothing but pictures, as its users hold it: a class in, raw predictions over pixels out.

A prompt is the name or the number of a class, and the empty prompt is the null label ∅ (Ho & Salimans 2022): no vector
is added to the time's. So ∅ needs no row in the table of classes, and a file is in the published form whether its
network met ∅ in training or not. One that did not (guided-diffusion's own) has no prediction for it and cannot guide
itself; a classifier can.

Source: Dhariwal & Nichol 2021, section 3.1, and upsampling; openai/guided-diffusion @ 22e0df8, unet.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.class_names import ClassNames
from models.errors import ModelError
from models.offload import Offload
from models.pixels import PixelModel
from models.streaming import Window
from models.text import TextFeatures
from models.tokenizer import Tokens
from models.unet import UNet
from models.unet_model import Sampling


@dataclass(frozen=True)
class ClassTokenizer:
    """A prompt is one token: the number of its class, or for the empty one that of ∅, which follows the classes'."""

    classes: ClassNames

    @property
    def null(self) -> int:
        """The id of ∅."""
        return len(self.classes)

    def encode(self, texts: Sequence[str | int], placeholders: Mapping[str, int] | None = None) -> Tokens:
        """Names or numbers of classes, "" for none, to ids (B, 1).

        Raises ModelError for a class that there is not, for one that is in no list, and for a learned word.
        """
        if isinstance(texts, str):
            raise ModelError(f"classes are a list of names or numbers: put {texts!r} in brackets")
        if placeholders:
            raise ModelError(f"a model of classes reads no words, and so no learned ones: {', '.join(placeholders)}")
        ids = torch.tensor([[self.null if text == "" else self.classes.index(text)] for text in texts], device="cpu")
        return Tokens(ids, ids < self.null, [""] * len(texts))


@dataclass
class ClassModel(PixelModel):
    """A UNet of pixels with its classes, and what is needed to use it.

    classes: their names, none for an unconditional model. schedule: keyword arguments of diffusion.Schedule.
    resolution: side of the images that it was trained on. source: where it is from. null: whether it met ∅ in training.
    factor: how many times larger its images are than the small ones that it is shown; 1 if it is shown none. upsampler:
    what enlarges this one's images, if anything does. checkpointing, attention, offload, window: see `UNetModel`.

    Raises ModelError for parts that do not fit each other.
    """

    unet: UNet
    classes: ClassNames
    schedule: dict[str, Any]
    resolution: int
    source: str
    null: bool
    factor: int = 1
    upsampler: "ClassModel | None" = None
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    offload: Offload = "none"
    window: Window | None = None
    prediction: ClassVar[str] = "epsilon"
    family: ClassVar[str] = "classes"
    width: ClassVar[int] = 0     # of a token's vector: nothing here reads words
    inpaints: ClassVar[bool] = False

    def __post_init__(self) -> None:
        unet = self.unet.config
        pairs = {
            "the UNet's classes and their names": (unet.num_classes or 0, len(self.classes)),
            "the UNet's input channels and what stands in them": (unet.in_channels, 3 + 3 * (self.factor > 1)),
        }
        self.require_fit(pairs | self.upsampler_pairs())
        if unet.out_channels not in (3, 6):
            raise ModelError(f"{self.source} answers {unet.out_channels} channels: neither 3, nor 6 with a variance")
        if not (self.classes.names or self.null):
            raise ModelError(f"{self.source} has neither classes nor the null label: there is nothing that it can draw")

    @property
    def tokenizer(self) -> ClassTokenizer:
        """What turns a prompt into a class."""
        return ClassTokenizer(self.classes)

    @property
    def guides_itself(self) -> bool:
        """Whether it has two predictions, for a class and for ∅, between which a scale can stand."""
        return self.null and len(self.classes) > 0

    @property
    def sampling(self) -> Sampling:
        """What suits it when images are drawn: the steps of guided-diffusion's README."""
        steps = min(250, self.schedule.get("steps", 1000))
        return Sampling("ddpm", str(steps), 2.0 if self.guides_itself and self.factor == 1 else 1.0)

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        """The classes' vectors (B, E) as the pooled feature, zero for ∅; no feature at all from an unconditional model.

        Raises ModelError for ∅ where the network never met it.
        """
        if not self.classes.names:
            return TextFeatures(None)
        if not self.null and (tokens.ids[:, 0] == self.tokenizer.null).any():
            raise ModelError(
                f"{self.source} was never trained without a class, so there is nothing for it to guide itself away "
                f"from: name a class in every prompt and draw at scale 1, or guide by guidance.classifier"
            )
        ids = tokens.ids[:, 0].to(self.device)
        vectors = self.unet.label_emb(ids.clamp(max=len(self.classes) - 1))                    # (B, E)
        return TextFeatures(None, vectors * (ids < self.tokenizer.null)[:, None])
