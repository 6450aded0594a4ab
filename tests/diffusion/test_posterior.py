"""The Gaussian between two levels, held against Bayes' rule in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.posterior import learned_log_variance, posterior_mean, posterior_variance, step_beta

noisier = st.floats(0.0, 0.9)
cleaner = st.floats(0.0, 1.0)


@given(noisier, cleaner)
def test_it_carries_one_marginal_to_the_other(a_t: float, fraction: float) -> None:
    """If x_t ~ q(x_t | x_0), a draw of the posterior is ~ q(x_s | x_0): mean and variance of a linear
    Gaussian map."""
    a_s = a_t + max(fraction, 1e-3) * (1 - a_t)
    one = torch.ones(1, 1, dtype=torch.float64)
    of_x_t = posterior_mean(0 * one, one, a_t, a_s).item()
    mean = posterior_mean(one, a_t**0.5 * one, a_t, a_s).item()
    variance = of_x_t**2 * (1 - a_t) + posterior_variance(a_t, a_s)
    assert abs(mean - a_s**0.5) < 1e-12  # float64; 1 - alpha_bar_t is at least 0.1
    assert abs(variance - (1 - a_s)) < 1e-12


@given(noisier, cleaner)
def test_bayes(a_t: float, fraction: float) -> None:
    """1 / variance is the sum of the precisions of q(x_s | x_0) and of q(x_t | x_s) seen from x_s."""
    a_s = min(a_t + max(fraction, 1e-3) * (1 - a_t), 0.999)
    alpha, beta = a_t / a_s, step_beta(a_t, a_s)
    precision = 1 / (1 - a_s) + alpha / beta
    assert abs(posterior_variance(a_t, a_s) * precision - 1) < 1e-10  # 1 - alpha_bar_s is at least 1e-3


def test_floats_and_batches_agree() -> None:
    a_t, a_s = torch.tensor([[0.2, 0.7], [0.5, 1.0]], dtype=torch.float64)
    x0, x_t = torch.randn(2, 2, 3, dtype=torch.float64)
    batch = posterior_mean(x0, x_t, a_t, a_s)
    for i in range(2):
        one = posterior_mean(x0, x_t, a_t[i].item(), a_s[i].item())[i]
        torch.testing.assert_close(batch[i], one, rtol=0, atol=1e-14)       # ten roundings of numbers of about 1


def test_learned_variance_ends() -> None:
    fractions = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    variances = learned_log_variance(fractions, 0.01, 0.04).exp()
    torch.testing.assert_close(variances, torch.tensor([0.01, 0.04, 0.02], dtype=torch.float64))
