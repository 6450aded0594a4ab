"""The Gaussian between two noise levels, q(x_s | x_t, x_0), and the variances of the way back from t to s.

With alpha = alpha_bar_t / alpha_bar_s and beta = 1 - alpha (Ho et al. 2020, equations 6 and 7, here for any
pair of levels, s less noisy than t):

    mean     = (sqrt(alpha_bar_s) beta · x_0 + sqrt(alpha) (1 - alpha_bar_s) · x_t) / (1 - alpha_bar_t)
    variance = beta (1 - alpha_bar_s) / (1 - alpha_bar_t)

The reverse process takes the small variance (this one), the large one (beta), or a learned one between the two on a log
scale (Nichol & Dhariwal 2021, equation 15). Every alpha_bar is a float or a (B,) float64 tensor.
"""

import math

import torch
from torch import Tensor

from diffusion.schedule import coefficient


def step_beta(alpha_bar_t: float | Tensor, alpha_bar_s: float | Tensor) -> float | Tensor:
    """The variance added from s to t, 1 - alpha_bar_t / alpha_bar_s; on the way back, the large variance."""
    return 1 - alpha_bar_t / alpha_bar_s


def posterior_mean(x0: Tensor, x_t: Tensor, alpha_bar_t: float | Tensor, alpha_bar_s: float | Tensor) -> Tensor:
    """x0, x_t: (B, …) -> the mean of q(x_s | x_t, x_0), (B, …), in their dtype."""
    beta = step_beta(alpha_bar_t, alpha_bar_s)
    of_x0 = alpha_bar_s**0.5 * beta / (1 - alpha_bar_t)
    of_x_t = (alpha_bar_t / alpha_bar_s) ** 0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return coefficient(of_x0, x0) * x0 + coefficient(of_x_t, x_t) * x_t


def posterior_variance(alpha_bar_t: float | Tensor, alpha_bar_s: float | Tensor) -> float | Tensor:
    """The variance of q(x_s | x_t, x_0), a float or (B,) float64; 0 when s is clean."""
    return step_beta(alpha_bar_t, alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def learned_log_variance(var_frac: Tensor, small: float | Tensor, large: float | Tensor) -> Tensor:
    """A learned variance's logarithm, between `small` (var_frac = 0) and `large` (1); both above 0.

    var_frac: (B, …). small, large: floats or (B,) float64. Returns (B, …) in var_frac's dtype.
    """
    low, high = (coefficient(_log(v), var_frac) for v in (small, large))
    return var_frac * high + (1 - var_frac) * low


def _log(value: float | Tensor) -> float | Tensor:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)
