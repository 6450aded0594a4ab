"""Guidance by a gradient: a denoiser that carries s · ∇ log p(y | x_t) beside its prediction.

The gradient is a classifier's, or that of CLIP's similarity of a text and a noisy image; the two are interchangeable.
What is done with it is the step's business: ancestral steps shift their mean, the others the score.

Source: Dhariwal & Nichol 2021, algorithms 1 and 2; Nichol et al. 2022 (GLIDE), section 2.4.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion import Denoiser, Level, Prediction
from guidance.errors import GuidanceError

Gradient = Callable[[Tensor, Level], Tensor]


def with_gradient(denoise: Denoiser, gradient: Gradient) -> Denoiser:
    """The denoiser's predictions with the gradient at the same x_t (B, C, H, W) as their guide."""

    def guided(x_t: Tensor, level: Level) -> Prediction:
        return replace(denoise(x_t, level), guide=gradient(x_t, level))

    return guided


def gradient_of(log_probability: Callable[[Tensor, Tensor], Tensor], scale: float) -> Gradient:
    """s · ∇ log p by autograd.

    log_probability: (x_t (B, C, H, W), t (B,) int64) -> (B,), of each sample alone. scale: s; 0 is off, and nothing is
    computed. A gradient that is zero everywhere or not finite does not guide: that is said once, with the time, as a
    UserWarning. Raises GuidanceError for a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise GuidanceError(f"the scale of a gradient is a finite number (0 is off), not {scale}")
    said: set[str] = set()

    @torch.enable_grad()
    def gradient(x_t: Tensor, level: Level) -> Tensor:
        if scale == 0:
            return torch.zeros_like(x_t)
        x = x_t.detach().requires_grad_()
        t = torch.full((len(x),), round(level.t), device=x.device)
        (grad,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        wrong = "is not finite" if not grad.isfinite().all() else "" if grad.any() else "is zero"
        if wrong and wrong not in said:
            said.add(wrong)
            warnings.warn(
                f"the gradient that should guide {wrong} at time {level.t:g}: it does not guide there", UserWarning,
                stacklevel=2,
            )  # fmt: skip
        return scale * (torch.zeros_like(grad) if wrong else grad)

    return gradient


def classifier(network: Any, classes: Sequence[int | str], scale: float) -> Gradient:
    """The gradient of log p(y | x_t) by a classifier that reads noise (Dhariwal & Nichol 2021, section 4.1).

    network: a `models.classifier.Classifier`, or anything with `classes` and (x_t (B, C, H, W), t (B,)) -> (B, classes)
    logits. classes: y, 0 … classes - 1, one an image; or their names, if the network has `names`, too. scale: s; the
    published classifiers take 0.5 to 10.

    Raises GuidanceError for a class that there is not, and when it is asked about more or fewer images than classes.
    """
    numbers = [_number(network, asked) for asked in classes]
    wrong = [asked for asked, y in zip(classes, numbers) if not 0 <= y < network.classes]
    if wrong or not numbers:
        what = f"class {wrong[0]} is none" if wrong else "no class is named"
        known = getattr(network, "names", f"0 to {network.classes - 1}")
        raise GuidanceError(f"{what}: this classifier knows {known}, and wants one an image")
    y = torch.tensor(numbers)

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        if len(x_t) != len(y):
            raise GuidanceError(f"{len(y)} classes for {len(x_t)} image{'s' * (len(x_t) > 1)}: give one an image")
        weight = next(network.parameters())
        logits = network(x_t.to(weight), t.to(weight.device)).to(x_t)                          # (B, classes)
        return logits.log_softmax(dim=1).gather(1, y.to(x_t.device)[:, None]).squeeze(1)

    return gradient_of(log_probability, scale)


def _number(network: Any, asked: int | str) -> int:
    """A class by its name or number; -1 for a name that no class has."""
    if isinstance(asked, int):
        return asked
    try:
        return network.names.index(asked)
    except (AttributeError, ValueError):
        return -1


def clip_gradient(clip: Any, texts: Sequence[str], scale: float) -> Gradient:
    """The gradient of a noise-aware CLIP's similarity, 100 cos(text, image), for B images of B texts.

    clip: a `models.noisy_clip.NoisyClip`. scale: GLIDE's notebook takes 3.
    """
    with torch.no_grad():
        text = clip.encode_text(texts)                                                         # (B, E)
    return gradient_of(lambda x, t: clip.similarity(text, x, t), scale)
