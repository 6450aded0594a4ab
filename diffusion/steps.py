"""Single steps from one noise level to a lower one.

A step is pure: x_t, a prediction and two levels in, x_s out, and any noise is an argument. x_t and x_s
preserve the variance, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. A classifier's guide, where
a prediction carries one, moves the mean of an ancestral step and the score of every other.
"""

import math

import torch
from torch import Tensor

from diffusion.denoiser import Prediction
from diffusion.errors import DiffusionError
from diffusion.posterior import learned_log_variance, posterior_mean, posterior_variance, step_beta
from diffusion.schedule import Level

VARIANCES = ("small", "large", "learned")
TINY = 1e-20  # below every variance that a step has, above what a logarithm refuses


def ddpm_step(
    x_t: Tensor,
    prediction: Prediction,
    level: Level,
    lower: Level,
    noise: Tensor,
    variance: str = "small",
    floor: float = TINY,
) -> Tensor:
    """A draw from p(x_s | x_t) (Ho et al. 2020, algorithm 2), its mean shifted by variance · guide.

    x_t, noise: (B, C, H, W). variance: `small` (the posterior's), `large` (beta), or `learned`, between
    them on a log scale. floor: the low end of a learned variance where `lower` is clean and the posterior
    has none; nothing random is added there, but a guide still moves the mean. Returns (B, C, H, W). Raises
    DiffusionError for another variance, or a learned one that the prediction does not carry, for a noisier `lower`, and
    for a clean level, from which nothing can be drawn.
    """
    _require_lower(level, lower)
    mean = posterior_mean(prediction.x0, x_t, level.alpha_bar, lower.alpha_bar)
    small = posterior_variance(level.alpha_bar, lower.alpha_bar)
    large = step_beta(level.alpha_bar, lower.alpha_bar)
    if variance == "learned":
        if prediction.var_frac is None:
            raise DiffusionError("this network does not predict a variance: take variance 'small' or 'large'")
        value = torch.exp(learned_log_variance(prediction.var_frac, max(small, floor), max(large, floor)))
    elif variance in VARIANCES:
        value = small if variance == "small" else large
    else:
        raise DiffusionError(f"no variance is called {variance!r}; there are {', '.join(VARIANCES)}")
    if prediction.guide is not None:
        mean = mean + value * prediction.guide  # Dhariwal & Nichol 2021, algorithm 1
    return mean if lower.alpha_bar == 1 else mean + value**0.5 * noise


def ddim_step(
    x_t: Tensor, prediction: Prediction, level: Level, lower: Level, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Song et al. 2021, equation 12: the guided x_0 and eps, put together again at a lower level.

    With eta = 0 `lower` may be the noisier level, and `level` clean: step by step an image is encoded into the noise
    that draws it again (their section 4.3).

    x_t, noise: (B, C, H, W); noise is needed if eta > 0. eta: from 0 (deterministic) to 1 (ancestral). Returns (B, C,
    H, W). Raises DiffusionError for a guide at alpha_bar = 0, and if eta > 0 for a missing noise, a noisier `lower` and
    a clean level.
    """
    if eta:
        _require_lower(level, lower)
    prediction = prediction.guided(x_t, level)
    remaining = 1 - lower.alpha_bar
    variance = eta**2 * posterior_variance(level.alpha_bar, lower.alpha_bar) if eta else 0.0  # equation 16
    if variance and noise is None:
        raise DiffusionError(f"a step of eta {eta:g} adds noise: give it, or take eta=0")
    x = lower.alpha_bar**0.5 * prediction.x0 + max(remaining - variance, 0.0) ** 0.5 * prediction.eps
    return x if variance == 0 else x + variance**0.5 * noise


def dpmpp_2m_step(
    x_t: Tensor, prediction: Prediction, level: Level, lower: Level, before: tuple[Tensor, Level] | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): of second order with the x_0 of the step before.

    x_t: (B, C, H, W). before: (x_0, level) of the step before, or None for first order, which is DDIM's step.
    A step to sigma = 0 is always of first order: the second would divide by an infinite step. Returns (B, C, H, W).
    Raises DiffusionError for a guide at alpha_bar = 0, and for a clean level, which has no log sigma.
    """
    if level.sigma == 0:
        raise DiffusionError("DPM-Solver++ goes by log sigma, which a clean level has not: begin where there is noise")
    h = math.log(level.sigma / lower.sigma) if lower.sigma > 0 else math.inf  # of lambda = -log sigma
    x0 = prediction.guided(x_t, level).x0
    if before is not None and lower.sigma > 0:
        x0_before, above = before
        h_before = math.log(above.sigma / level.sigma)  # infinite after pure noise: no correction
        x0 = x0 + 0.5 * h / h_before * (x0 - x0_before)
    keep = ((1 - lower.alpha_bar) / (1 - level.alpha_bar)) ** 0.5
    return keep * x_t - lower.alpha_bar**0.5 * math.expm1(-h) * x0


def _require_lower(level: Level, lower: Level) -> None:
    """Raise DiffusionError for a step to more noise, whose variance is negative, and from none, where it is 0/0."""
    if lower.alpha_bar < level.alpha_bar:
        raise DiffusionError(
            f"a step that draws from p(x_s | x_t) goes to less noise, not from time {level.t:g} to time {lower.t:g}: "
            "there take ddim_step with eta=0, or add noise, as q(x_t | x_s) does"
        )
    if level.alpha_bar == 1:
        raise DiffusionError(
            f"time {level.t:g} is clean (alpha_bar = 1), so there is no noise to draw anew: end the list of times "
            "there, or take eta=0"
        )
