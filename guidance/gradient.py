"""Guidance by a gradient: a denoiser that carries s · ∇ log p(y | x_t) beside its prediction.

The gradient is a classifier's, or that of CLIP's similarity of a text and a noisy image; the two are interchangeable.
What is done with it is the step's business: ancestral steps shift their mean, the others the score.

Source: Dhariwal & Nichol 2021, algorithms 1 and 2; Nichol et al. 2022 (GLIDE), section 2.4.
"""

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffusion import Denoiser, Level, Prediction
from guidance.errors import GuidanceError

Gradient = Callable[[Tensor, Level], Tensor]
# What goes back is multiplied by a power of two, which rounds nothing, and divided again: a network in float16 loses
# what is below 6e-8, as a gradient by pixels often is. Where the first is too much, beyond 65504, the next is tried.
RAISED = 2.0**12, 2.0**8, 1.0


def with_gradient(denoise: Denoiser, gradient: Gradient) -> Denoiser:
    """The denoiser's predictions with the gradient at the same x_t (B, C, H, W) as their guide; of several they carry
    the sum, as of independent conditions.

    What it returns raises GuidanceError where the gradient is no tensor like x_t: others would be broadcast in silence.
    """

    def guided(x_t: Tensor, level: Level) -> Prediction:
        guide = gradient(x_t, level)
        if not isinstance(guide, Tensor) or guide.shape != x_t.shape:
            found = f"a tensor {tuple(guide.shape)}" if isinstance(guide, Tensor) else f"a {type(guide).__name__}"
            raise GuidanceError(
                f"a gradient to guide by is a tensor {tuple(x_t.shape)}, as what is drawn, not {found}: of a "
                "log-probability guidance.gradient_of makes one"
            )
        prediction = denoise(x_t, level)
        return replace(prediction, guide=guide if prediction.guide is None else prediction.guide + guide)

    return guided


def gradient_of(log_probability: Callable[[Tensor, Tensor], Tensor], scale: float) -> Gradient:
    """s · ∇ log p by autograd.

    log_probability: (x_t (B, C, H, W), t (B,) int64) -> (B,), of each sample alone. scale: s; 0 is off, and nothing is
    computed. A sample whose gradient is zero everywhere or not finite is not guided: that is said once, with the time,
    as a UserWarning. Raises GuidanceError for a scale that is not finite, and a log-probability that is no tensor (B,).
    """
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise GuidanceError(f"the scale of a gradient is a finite number (0 is off), not {scale!r}")
    said: set[str] = set()

    @torch.inference_mode(False)                         # where nothing could have a gradient
    @torch.enable_grad()
    def gradient(x_t: Tensor, level: Level) -> Tensor:
        if scale == 0:
            return torch.zeros_like(x_t)
        x = x_t.detach().clone().requires_grad_()
        t = torch.full((len(x),), round(level.t), device=x.device)
        log_p = log_probability(x, t)
        if not isinstance(log_p, Tensor) or log_p.shape != t.shape:
            found = f"a tensor {tuple(log_p.shape)}" if isinstance(log_p, Tensor) else f"a {type(log_p).__name__}"
            raise GuidanceError(f"a log-probability is a tensor ({len(x)},), a number an image, not {found}")
        grad = torch.zeros_like(x)
        for factor in RAISED if log_p.requires_grad else ():
            how = {"materialize_grads": True, "retain_graph": factor > 1}           # by x perhaps not, by weights alone
            (grad,) = torch.autograd.grad(factor * log_p.sum(), x, **how)
            grad = grad / factor
            if grad.isfinite().all():
                break
        finite, there = grad.flatten(1).isfinite().all(dim=1), grad.flatten(1).any(dim=1)      # (B,)
        for wrong, of in (("is not finite", ~finite), ("is zero", finite & ~there)):
            if of.any() and wrong not in said:
                said.add(wrong)
                warnings.warn(
                    f"the gradient that should guide {wrong} at time {level.t:g}: it does not guide there", UserWarning,
                    stacklevel=2,
                )  # fmt: skip
        return scale * torch.where(finite[:, None, None, None], grad, 0)

    return gradient


def classifier(network: Any, classes: Sequence[int | str], scale: float) -> Gradient:
    """The gradient of log p(y | x_t) by a classifier that reads noise (Dhariwal & Nichol 2021, section 4.1).

    network: a `models.classifier.Classifier`, or anything with `classes` and (x_t (B, C, H, W), t (B,)) -> (B, classes)
    logits. classes: y, 0 … classes - 1, one an image; or their names, if the network has `names`, too. scale: s; the
    published classifiers take 0.5 to 10.

    Raises GuidanceError for what is no classifier, for a class that there is not, and when it is asked about more or
    fewer images than classes.
    """
    if not isinstance(getattr(network, "classes", None), int):
        raise GuidanceError(f"a {type(network).__name__} is no classifier: take one of models.load_classifier")
    listed = classes.ndim > 0 if isinstance(classes, Tensor) else isinstance(classes, Sequence)
    if isinstance(classes, str) or not listed:
        raise GuidanceError(f"classes are one an image, [{classes!r}] for one, not {classes!r}")
    numbers = [_number(network, asked) for asked in classes]
    wrong = [asked for asked, y in zip(classes, numbers) if not 0 <= y < network.classes]
    if wrong or not numbers:
        what = f"class {wrong[0]} is none" if wrong else "no class is named"
        known = getattr(network, "names", f"0 to {network.classes - 1}")
        raise GuidanceError(f"{what}: this classifier knows {known}, and wants one an image")
    parameters = getattr(network, "parameters", tuple)
    with torch.inference_mode(False):
        y = torch.tensor(numbers, device="cpu")

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        if len(x_t) != len(y):
            raise GuidanceError(f"{len(y)} classes for {len(x_t)} image{'s' * (len(x_t) > 1)}: give one an image")
        weight = next(iter(parameters()), x_t)               # of a network that has none, as x_t is
        logits = network(x_t.to(weight), t.to(weight.device)).to(x_t)                          # (B, classes)
        return logits.log_softmax(dim=1).gather(1, y.to(x_t.device)[:, None]).squeeze(1)

    return gradient_of(log_probability, scale)


def _number(network: Any, asked: int | str) -> int:
    """A class by its name or number; -1 for a name that no class has."""
    with contextlib.suppress(TypeError):
        return operator.index(asked)
    with contextlib.suppress(AttributeError, ValueError):
        return network.names.index(asked)
    return -1


def clip_gradient(clip: Any, texts: Sequence[str], scale: float) -> Gradient:
    """The gradient of a noise-aware CLIP's similarity, 100 cos(text, image), for B images of B texts.

    clip: a `models.noisy_clip.NoisyClip`, in any dtype and on any device. scale: GLIDE's notebook takes 3.

    Raises GuidanceError for what is no such CLIP, for texts that are none, and when it is asked about more or fewer
    images than texts, or about images of another size than CLIP's.
    """
    if not hasattr(clip, "similarity"):
        raise GuidanceError(f"a {type(clip).__name__} is no noise-aware CLIP: take that of models.load_noisy_clip")
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        raise GuidanceError(f"texts are one an image, [{texts!r}] for one, not {texts!r}")
    if not texts:
        raise GuidanceError("there is no text: give one an image")
    with torch.inference_mode(False), torch.no_grad():
        text = clip.encode_text(texts)                                                         # (B, E)

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        side = clip.config.image_size
        if len(x_t) != len(text) or x_t.shape[1:] != (3, side, side):
            raise GuidanceError(
                f"{len(text)} texts want as many images of 3 channels and {side}x{side} pixels, and what is drawn is "
                f"{tuple(x_t.shape)}"
            )
        return clip.similarity(text, x_t.to(text), t.to(text.device)).to(x_t)

    return gradient_of(log_probability, scale)
