"""Classifier-free guidance: a denoiser around denoisers (Ho & Salimans 2022, equation 6).

    guided = null + scale · (conditional - null),       scale = 1 + w of the paper

0 is the null prediction, 1 the conditional one (guidance is off), beyond 1 extrapolates. The weights add up
to 1, so eps, x_0 and v may each be combined, with the same answer; both that a `Prediction` carries are. A
negative prompt is a null prompt that says something.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion import Denoiser, Level, Prediction, predict
from guidance.errors import GuidanceError


class Predictor(Protocol):
    """The part of a model that a denoiser asks."""

    prediction: str  # epsilon, v_prediction or sample

    def predict(self, x_t: Tensor, t: Tensor, features: Any) -> Tensor:
        """x_t: (B, C, h, w); t: (B,) float; features: what the model's text encoder gave for B prompts.

        Returns (B, C, h, w). A model that `shares` takes b of x_t and t for B = k b prompts, too, every b of the same.
        """
        ...


def bind(model: Predictor, features: Any, times: int = 1) -> Denoiser:
    """A denoiser of x_t (B, C, h, w) with its prompts bound. features: of B prompts, as the model's encoder gives them.

    times: how often x_t will hold the same samples, one run of them after the other; `classifier_free_pair` gives them
    twice. A model that `shares` is shown one run, and computes once what does not depend on the prompts.
    """
    times = times if getattr(model, "shares", False) else 1

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        shown = x_t[: len(x_t) // times]                                                       # (b, C, h, w)
        t = torch.full((len(shown),), level.t, dtype=torch.float32, device=x_t.device)         # (b,)
        return predict(model.prediction, x_t, model.predict(shown, t, features), level.alpha_bar)

    return denoise


def classifier_free(conditional: Denoiser, null: Denoiser, scale: float) -> Denoiser:
    """Guidance from two denoisers of x_t (B, C, h, w); at scale 1 or 0 only the one that counts is asked.

    Raises GuidanceError for a scale of several numbers, and as `combine`.
    """
    if getattr(scale, "ndim", 0):
        raise GuidanceError(f"a guidance scale is one number (1 is off), not {scale!r}")
    if scale in (0, 1):
        return conditional if scale == 1 else null
    return lambda x_t, level: combine(conditional(x_t, level), null(x_t, level), scale)


def classifier_free_pair(both: Denoiser, scale: float) -> Denoiser:
    """Guidance from one denoiser bound to 2B prompts, the null ones first: one pass over a doubled batch.

    Returns a denoiser of x_t (B, C, h, w), which raises as `combine`.
    """

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        prediction = both(torch.cat([x_t, x_t]), level)                                        # (2B, C, h, w)
        halves = {name: field.chunk(2) for name, field in vars(prediction).items() if isinstance(field, Tensor)}
        null, conditional = (
            replace(prediction, **{name: half[i] for name, half in halves.items()}) for i in (0, 1)
        )                                                                                      # (B, C, h, w) each
        return combine(conditional, null, scale)

    return denoise


def combine(conditional: Prediction, null: Prediction, scale: float) -> Prediction:
    """null + scale · (conditional - null) on x_0 and eps; a learned variance and a guide stay the conditional's.

    That is GLIDE's choice for the variance (openai/glide-text2im at 69b5307, its text2im notebook). Raises
    GuidanceError for a guide of the null prediction alone, which would have no effect.
    """
    if null.guide is not None and conditional.guide is None:
        raise GuidanceError("a gradient guides the null prediction alone: guide the conditional one, or what both make")
    x0, eps = (n + scale * (c - n) for c, n in ((conditional.x0, null.x0), (conditional.eps, null.eps)))
    return replace(conditional, x0=x0, eps=eps, clipped=False)
