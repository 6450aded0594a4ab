"""One network's way from noise to images: its prompts bound, its guidance around it, a sampler over its levels.

A cascade is several of these, each told what the one before drew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion import SAMPLERS, Denoiser, Level, Prediction, draw
from guidance.classifier_free import bind, classifier_free_pair
from guidance.gradient import Gradient, with_gradient


class Model(Protocol):
    """What `models.LatentModel`, `models.GlideModel` and `models.ClassModel` offer and images need."""

    tokenizer: Any
    schedule: dict[str, Any]
    prediction: str
    resolution: int
    width: int
    family: str
    source: str      # where it is from, for what is said of it
    device: torch.device
    sampling: Any    # the sampler, its steps, the guidance scale, the factor on the first noise
    pixels: bool     # x_0 is an image in [-1, 1], and is clipped as such
    factor: int      # how many times it enlarges an image; 1 if it draws from noise alone
    upsampler: Any   # another model, or None; models that enlarge, or inpaint, have `given`, see `models.pixels`, too

    def encode_text(self, tokens: Any, extra: Tensor | None = None) -> Any: ...
    def predict(self, x_t: Tensor, t: Tensor, features: Any) -> Tensor: ...
    def moments(self, images: Tensor) -> Tensor: ...
    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor: ...
    def decode(self, x0: Tensor) -> Tensor: ...
    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Chain:
    """How B prompts are drawn by a network.

    negatives: B. shape: (C, h, w) of x_0. placeholders, extra: the learned words in the prompts, as the tokenizer and
    the text network take them. image: (B, 3, H, W), to start from at levels[0]. kept: an image (B, 3, H, W) and a mask
    (B, 1, H, W), 1 where it stays. gradient: see `guidance.gradient`.
    """

    model: Model
    prompts: list[str]
    negatives: list[str]
    scale: float
    sampler: str
    levels: Sequence[Level]
    shape: tuple[int, int, int]
    placeholders: dict[str, int] = field(default_factory=dict)
    extra: Tensor | None = None
    image: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    gradient: Gradient | None = None

    def __len__(self) -> int:
        """Steps."""
        return len(self.levels) - 1

    def draw(
        self, part: slice, streams: list[torch.Generator], small: Tensor | None, step_done: Callable[[], object]
    ) -> Tensor:
        """The images (b, 3, H, W) of some of the prompts, each with its stream of noise.

        small: (b, 3, h, w), what the chain before drew, for an upsampler.
        """
        kept = None if self.kept is None else tuple(each[part].to(self.model.device) for each in self.kept)
        denoise, x = self._denoiser(part, small, kept), self._first(part, streams)
        for state in SAMPLERS[self.sampler](denoise, x, self.levels, generator=streams):
            x = state.x                                                                        # (b, C, h, w)
            step_done()
        images = self.model.decode(x)
        return images if kept is None else torch.where(kept[1].bool(), kept[0], images)        # PLMS mixes steps

    def _denoiser(self, part: slice, small: Tensor | None, kept: tuple[Tensor, Tensor] | None) -> Denoiser:
        """Guided: the networks see the negative prompts' rows, then the prompts'; at scale 1 or 0 only what counts."""
        model, prompts, negatives = self.model, self.prompts[part], self.negatives[part]
        asked = {0: negatives, 1: prompts}.get(self.scale, negatives + prompts)
        features = model.encode_text(model.tokenizer.encode(asked, self.placeholders), self.extra)
        if small is not None or kept is not None:
            model = model.given(self.shape[1:], small, *(kept or (None, None)))
        if self.scale in (0, 1):
            denoise = bind(model, features)
        else:
            denoise = classifier_free_pair(bind(model, features, times=2), self.scale)
        if self.gradient is not None:
            denoise = with_gradient(denoise, self.gradient)
        if self.model.pixels:
            denoise = clamped(denoise)
        return denoise if kept is None else keeping(denoise, *kept)

    def _first(self, part: slice, streams: list[torch.Generator]) -> Tensor:
        """x at the first level: N(0, I), or a draw of q(x_t | x_0) of the images. In float32: so is all noise then."""
        model, level = self.model, self.levels[0]

        def noise() -> Tensor:
            return draw((len(streams), *self.shape), streams).to(model.device)

        if self.image is None:
            return model.sampling.noise * noise()
        x0 = model.draw_x0(model.moments(self.image[part].to(model.device)), noise())
        return (level.alpha_bar**0.5 * x0 + (1 - level.alpha_bar) ** 0.5 * noise()).float()


def clamped(denoise: Denoiser) -> Denoiser:
    """x_0 stays in [-1, 1]: without it pixels run away under guidance (Saharia et al. 2022, section 2.3)."""
    return lambda x_t, level: denoise(x_t, level).clamped(x_t, level)


def keeping(denoise: Denoiser, image: Tensor, mask: Tensor) -> Denoiser:
    """x_0 is the image wherever the mask is 1, at every step.

    image: (B, 3, H, W). mask: (B, 1, H, W), 0 or 1. Source: openai/glide-text2im @ 69b5307, its inpainting notebook.
    """

    def denoise_rest(x_t: Tensor, level: Level) -> Prediction:
        prediction = denoise(x_t, level)
        return prediction.with_x0(x_t, torch.where(mask.bool(), image, prediction.x0), level)

    return denoise_rest
