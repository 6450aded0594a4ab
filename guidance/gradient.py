"""Guidance by a gradient: a denoiser that carries s · ∇ log p(y | x_t) beside its prediction.

The gradient is a classifier's, or that of CLIP's similarity of a text and a noisy image; the two are interchangeable.
What is done with it is the step's business: ancestral steps shift their mean, the others the score.

Source: Dhariwal & Nichol 2021, algorithms 1 and 2; Nichol et al. 2022 (GLIDE), section 2.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion import Denoiser, Level, Prediction

Gradient = Callable[[Tensor, Level], Tensor]


def with_gradient(denoise: Denoiser, gradient: Gradient) -> Denoiser:
    """The denoiser's predictions with the gradient at the same x_t (B, C, H, W) as their guide."""

    def guided(x_t: Tensor, level: Level) -> Prediction:
        return replace(denoise(x_t, level), guide=gradient(x_t, level))

    return guided


def gradient_of(log_probability: Callable[[Tensor, Tensor], Tensor], scale: float) -> Gradient:
    """s · ∇ log p by autograd.

    log_probability: (x_t (B, C, H, W), t (B,) int64) -> (B,), of each sample alone. scale: s; 0 is off.
    """

    @torch.enable_grad()
    def gradient(x_t: Tensor, level: Level) -> Tensor:
        x = x_t.detach().requires_grad_()
        t = torch.full((len(x),), round(level.t), device=x.device)
        (grad,) = torch.autograd.grad(log_probability(x, t).sum(), x)
        return scale * grad

    return gradient


def clip_gradient(clip: Any, texts: Sequence[str], scale: float) -> Gradient:
    """The gradient of a noise-aware CLIP's similarity, 100 cos(text, image), for B images of B texts.

    clip: a `models.noisy_clip.NoisyClip`. scale: GLIDE's notebook takes 3.
    """
    with torch.no_grad():
        text = clip.encode_text(texts)                                                         # (B, E)
    return gradient_of(lambda x, t: clip.similarity(text, x, t), scale)
