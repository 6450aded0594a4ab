"""What a network is trained on.

- Mean squared error on the target that the network predicts: eps (Ho et al. 2020, equation 14), v (Salimans
  & Ho 2022) or x_0, one number a sample, in float32.
- Min-SNR weights (Hang et al. 2023, section 3.4): min(SNR, gamma) on the error of x_0, which is min(1,
  gamma / SNR) on eps and min(SNR, gamma) / (SNR + 1) on v.
- The hybrid bound of a network that also predicts its variance (Nichol & Dhariwal 2021, equation 16): the
  error on eps (or v) plus T / 1000 times a term of the variational bound in which the mean is held fixed, so that
  it trains the variance alone. The term is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits a
  dimension; at t = 0 it is the negative log-likelihood of x_0 as 8-bit pixels.
"""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.denoiser import predict, require_form
from diffusion.errors import DiffusionError
from diffusion.posterior import learned_log_variance, posterior_mean, posterior_variance, step_beta
from diffusion.schedule import Schedule, coefficient


def random_times(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 times in 0 … steps - 1, one in each of `count` strata of equal length, ascending.

    So the mean loss of a batch varies less than that of times drawn each for itself. generator: on the CPU.
    """
    within = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    strata = within + torch.arange(count, device="cpu")
    return (strata * (steps / count)).long().clamp(max=steps - 1)      # the last one may be rounded up to T


def target(schedule: Schedule, form: str, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What a network of this form should answer at x_t = q_sample(x0, t, noise).

    form: `epsilon`, `v_prediction` or `sample`. x0, noise: (B, …). t: (B,) int64. Returns (B, …).
    Raises DiffusionError for another form, and for v at a time that the schedule does not have.
    """
    require_form(form)
    if form == "v_prediction":
        return schedule.velocity(x0, t, noise)
    return noise if form == "epsilon" else x0


def mse(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample. output, wanted: (B, …) alike, else DiffusionError. Returns (B,) float32 (or
    float64).
    """
    if output.shape != wanted.shape:
        raise DiffusionError(f"the network answered {tuple(output.shape)}, wanted was {tuple(wanted.shape)}")
    dtype = torch.promote_types(output.dtype, torch.float32)  # squares of float16 would drown below 6e-8
    return ((output.to(dtype) - wanted.to(dtype)) ** 2).flatten(1).mean(1)


def min_snr_weight(schedule: Schedule, form: str, t: Tensor, gamma: float = 5.0) -> Tensor:
    """The min-SNR weight of each sample's error (Hang et al. 2023).

    form: `epsilon`, `v_prediction` or `sample`. t: (B,) int64 >= 0. gamma: above 0. Returns (B,) float32 on t's device.
    Raises DiffusionError for another form, for another gamma, and for a time that the schedule does not have.
    """
    if not isinstance(gamma, Real) or not gamma > 0:
        raise DiffusionError(f"gamma is a number above 0, not {gamma!r}: math.inf is no limit")
    require_form(form)
    snr = schedule.snr(t)
    if form == "epsilon":
        weight = (gamma / snr).clamp(max=1)  # SNR = 0 gives 1
    elif form == "v_prediction":
        weight = snr.clamp(max=gamma) / (snr + 1)
    else:
        weight = snr.clamp(max=gamma)
    return weight.float().to(t.device)


class HybridLoss(NamedTuple):
    """The two terms of a learned-variance network's loss, (B,) float32 (or float64) each; train on `mse + vb`."""

    mse: Tensor
    vb: Tensor


def hybrid_loss(
    schedule: Schedule, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor, form: str = "epsilon"
) -> HybridLoss:
    """Nichol & Dhariwal 2021, equation 16, with their factor T / 1000 on the second term.

    output: (B, 2C, H, W), what the network predicts and then the raw variance in [-1, 1], at x_t = q_sample(x0, t,
    noise). x0, noise: (B, C, H, W), x0 in [-1, 1]. t: (B,) int64. form: as for `target`; theirs is epsilon. Raises
    DiffusionError for another form, another number of channels, a time that the schedule does not have, epsilon at
    alpha_bar = 0, and a schedule that adds no noise at one of its times.
    """
    if output.shape[1] != 2 * x0.shape[1]:
        raise DiffusionError(
            f"a network that learned its variance answers {2 * x0.shape[1]} channels of {x0.shape[1]}, this one "
            f"{output.shape[1]}: take `mse` where there is none"
        )
    output, x0, noise = (_wide(each) for each in (output, x0, noise))
    answer, raw = output.chunk(2, dim=1)
    x_t = schedule.q_sample(x0, t, noise)
    predicted = predict(form, x_t, answer.detach(), schedule.alpha_bar(t)).x0
    vb = variational_bound(schedule, predicted, (raw + 1) / 2, x0, x_t, t)
    return HybridLoss(mse(answer, target(schedule, form, x0, t, noise)), vb * (schedule.steps / 1000))


def variational_bound(
    schedule: Schedule, predicted: Tensor, var_frac: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound, bits a dimension (Nichol & Dhariwal 2021, equations 4 to 6).

    predicted, x0, x_t: (B, C, H, W), x_0 as a network has it and as it is, in [-1, 1]. var_frac: the same shape, where
    the variance lies, 0 to 1, see `Prediction`. t: (B,) int64. Returns (B,) float32 (or float64). Raises DiffusionError
    for a time that the schedule does not have, and for a schedule that adds no noise at one of its times, since a
    variance would be 0.
    """
    if not schedule.betas.all():
        at = int((schedule.betas == 0).nonzero()[0])
        raise DiffusionError(
            f"a variational bound needs noise that is added at every time; this schedule adds none at time {at}, with "
            f"alpha_bar = {schedule.alphas_bar[at]:g}"
        )
    predicted, var_frac, x0, x_t = (_wide(each) for each in (predicted, var_frac, x0, x_t))
    now, before = schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
    t_kept = t.clamp(min=1)  # the posterior at t = 0 has no variance: the published objective takes t = 1
    small = posterior_variance(schedule.alpha_bar(t_kept), schedule.alpha_bar(t_kept - 1))

    true_mean = posterior_mean(x0, x_t, now, before)
    mean = posterior_mean(predicted, x_t, now, before)
    log_variance = learned_log_variance(var_frac, small, step_beta(now, before))

    kl = _normal_kl(true_mean, coefficient(small.log(), x0), mean, log_variance)
    nll = -_pixel_log_likelihood(x0, mean, 0.5 * log_variance)
    kl, nll = (term.flatten(1).mean(1) / math.log(2) for term in (kl, nll))
    return torch.where(t.to(x0.device) == 0, nll, kl)


def _wide(x: Tensor) -> Tensor:
    """In float32 or float64: a variance of 1e-9 is divided by, and logarithms of -20 are subtracted."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - difference - 1 + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _pixel_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(the 8-bit bin of x) under N(mean, exp(log_scale)²), outermost bins open (Ho et al., eq. 13)."""
    inverse = torch.exp(-log_scale)
    above = _normal_cdf(inverse * (x - mean + 1 / 255)).masked_fill(x > 0.999, 1.0)
    below = _normal_cdf(inverse * (x - mean - 1 / 255)).masked_fill(x < -0.999, 0.0)
    return (above - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation (absolute error below 4e-4): with it the published numbers were made."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
