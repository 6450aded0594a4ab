"""Losses: numbers that can be known, what carries a gradient, and the shape of what comes back."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion import (
    DiffusionError,
    Prediction,
    Schedule,
    hybrid_loss,
    min_snr_weight,
    mse,
    random_times,
    variational_bound,
)
from diffusion.objective import _normal_cdf
from diffusion.posterior import posterior_variance


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_a_time_lies_in_each_stratum_and_none_beyond_the_last(monkeypatch: pytest.MonkeyPatch, drawn: float) -> None:
    """Not even for the largest number that torch.rand gives, which is rounded up in the last stratum."""
    monkeypatch.setattr(torch, "rand", lambda b, generator, **how: torch.full((b,), drawn, **how))
    times = random_times(32, 1000, torch.Generator())
    assert times.dtype == torch.int64
    ends = [min(1000 * (i + (drawn > 0)) // 32, 999) for i in range(32)]
    assert times.tolist() == ends


def test_mse_is_one_number_a_sample_in_float32() -> None:
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float16)
    errors = mse(output, torch.zeros_like(output))
    assert errors.dtype == torch.float32
    assert errors.tolist() == [5.0, 0.0]
    tiny = torch.full((1, 4), 2.0**-14, dtype=torch.float16)  # its square, 2^-28, is below float16's smallest
    assert mse(tiny, 0 * tiny).item() == 2.0**-28


def test_mse_does_not_broadcast() -> None:
    with pytest.raises(DiffusionError, match=r"answered \(2, 6\), wanted was \(2, 3\)"):
        mse(torch.zeros(2, 6), torch.zeros(2, 3))


@pytest.mark.parametrize("zero", [False, True])
def test_min_snr_is_one_weight_in_three_forms(zero: bool) -> None:
    """At one x_t the errors of x_0, eps and v differ by known factors, so the weighted errors must be
    equal."""
    schedule = Schedule("scaled_linear", zero_terminal_snr=zero)
    t = torch.tensor([0, 150, 400, 998 if zero else 999])
    x0, noise, wrong = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    x_t, alpha_bar = schedule.q_sample(x0, t, noise), schedule.alpha_bar(t)
    guess = Prediction.from_x0(x_t, x0 + wrong, alpha_bar)
    v = schedule.velocity(guess.x0, t, guess.eps)
    weighted = [
        min_snr_weight(schedule, "sample", t) * mse(guess.x0, x0),
        min_snr_weight(schedule, "epsilon", t) * mse(guess.eps, noise),
        min_snr_weight(schedule, "v_prediction", t) * mse(v, schedule.velocity(x0, t, noise)),
    ]
    torch.testing.assert_close(weighted[1], weighted[0], rtol=1e-6, atol=0)  # the weights are float32
    torch.testing.assert_close(weighted[2], weighted[0], rtol=1e-6, atol=0)


def test_min_snr_at_pure_noise_and_gamma() -> None:
    schedule, end = Schedule("scaled_linear", zero_terminal_snr=True), torch.tensor([999])
    assert [min_snr_weight(schedule, f, end).item() for f in ("epsilon", "v_prediction", "sample")] == [
        1,
        0,
        0,
    ]
    assert min_snr_weight(schedule, "sample", torch.tensor([0]), gamma=3.0).item() == 3.0
    for gamma in (0.0, -1.0, math.nan, None):                         # the first: no loss at all, not no weights
        with pytest.raises(DiffusionError, match=f"gamma is a number above 0, not {gamma}: math.inf is no limit"):
            min_snr_weight(schedule, "v_prediction", end, gamma)
    assert min_snr_weight(schedule, "epsilon", torch.tensor([0]), math.inf).item() == 1
    assert min_snr_weight(schedule, "epsilon", end).dtype == torch.float32     # a loss times it stays so
    with pytest.raises(DiffusionError, match="no network predicts 'x'"):
        min_snr_weight(schedule, "x", end)


def test_bound_is_zero_for_the_posterior_itself() -> None:
    schedule, t = Schedule("linear"), torch.tensor([1, 500, 999])
    x0, noise = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    x_t = schedule.q_sample(x0, t, noise)
    bound = variational_bound(schedule, x0, torch.zeros_like(x0), x0, x_t, t)
    assert bound.abs().max() < 1e-12    # float64 rounds at 2e-16, the logarithm of a variance of 1e-4 at 2e-15


def test_bound_for_another_variance_is_the_formula() -> None:
    """Right mean, variance beta instead of the posterior's: KL = (log r + 1 / r - 1) / 2, r = beta /
    posterior."""
    schedule, t = Schedule("squaredcos_cap_v2"), torch.tensor([400])
    x0, noise = torch.rand(2, 1, 1, 4, 4, dtype=torch.float64) * 2 - 1
    bound = variational_bound(schedule, x0, torch.ones_like(x0), x0, schedule.q_sample(x0, t, noise), t)
    now, before = schedule.alphas_bar[400].item(), schedule.alphas_bar[399].item()
    ratio = schedule.betas[400].item() / posterior_variance(now, before)
    # float64; log r + 1 / r - 1 of an r near 1 is a difference of numbers a thousand times its size
    assert bound.item() == pytest.approx((math.log(ratio) + 1 / ratio - 1) / 2 / math.log(2), rel=1e-9)


def test_bound_at_time_zero_is_a_likelihood_of_pixels() -> None:
    """With the right mean, a pixel's bin of half-width 1/255 holds erf(z / sqrt 2) of the mass, z in
    deviations."""
    schedule, t = Schedule("linear"), torch.tensor([0])
    x0 = torch.full((1, 1, 2, 2), 0.2, dtype=torch.float64)
    noise = torch.randn_like(x0)
    x_t = schedule.q_sample(x0, t, noise)
    bound = variational_bound(schedule, x0, torch.ones_like(x0), x0, x_t, t)  # variance beta_0 = 1e-4
    mass = math.erf(1 / 255 / 0.01 / math.sqrt(2))
    assert bound.item() == pytest.approx(-math.log2(mass), abs=4e-3)  # the tanh form of the CDF is 4e-4 off
    bound = variational_bound(schedule, x0, torch.zeros_like(x0), x0, x_t, t)  # the variance of t = 1
    small = posterior_variance(schedule.alphas_bar[1].item(), schedule.alphas_bar[0].item())
    mass = math.erf(1 / 255 / small**0.5 / math.sqrt(2))
    assert bound.item() == pytest.approx(-math.log2(mass), abs=4e-3)
    edge = torch.full(
        (1, 1, 2, 2), 1.0, dtype=torch.float64
    )  # the outermost bin is open: it holds more than half
    x_t = schedule.q_sample(edge, t, noise)
    assert variational_bound(schedule, edge, torch.ones_like(x0), edge, x_t, t).item() < 1
    far = variational_bound(schedule, -x0, torch.ones_like(x0), x0, schedule.q_sample(x0, t, noise), t)
    # 40 deviations off no mass is left, and Ho et al.'s code takes 1e-12 for it; float64
    assert far.item() == pytest.approx(-math.log2(1e-12), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bound_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Of the numbers that come in: in their dtype it was wrong by half."""
    schedule, t = Schedule("squaredcos_cap_v2", steps=4000), torch.tensor([0, 1, 1333, 3999])
    x0, noise, wrong = (torch.rand(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    output = torch.cat([noise + wrong / 4, wrong], dim=1)
    wanted = hybrid_loss(schedule, output.double(), x0.double(), t, noise.double())
    for found, exact in zip(hybrid_loss(schedule, output, x0, t, noise), wanted):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)    # float32, a difference of 1s
    x_t, t = schedule.q_sample(x0, t, noise)[1:], t[1:]     # at 0 a far pixel's mass is what float32 leaves of 1 - 1
    given = (x0 + wrong / 4)[1:], ((wrong + 1) / 2)[1:], x0[1:], x_t
    found = variational_bound(schedule, *given, t)
    assert found.dtype == torch.float32
    exact = variational_bound(schedule, *(each.double() for each in given), t)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)


def test_hybrid_is_the_same_bound_of_a_network_that_predicts_v() -> None:
    schedule, t = Schedule("linear"), torch.tensor([1, 400, 900])
    x0, noise, wrong, raw = torch.rand(4, 3, 3, 4, 4, dtype=torch.float64) * 2 - 1
    x_t, alpha_bar = schedule.q_sample(x0, t, noise), schedule.alpha_bar(t)
    guess = Prediction.from_x0(x_t, x0 + wrong, alpha_bar)
    of_eps = hybrid_loss(schedule, torch.cat([guess.eps, raw], dim=1), x0, t, noise)
    v = schedule.velocity(guess.x0, t, guess.eps)
    of_v = hybrid_loss(schedule, torch.cat([v, raw], dim=1), x0, t, noise, "v_prediction")
    torch.testing.assert_close(of_v.vb, of_eps.vb, rtol=1e-6, atol=0)   # eps and back divides by sqrt(alpha_bar), 0.02
    # v - v' = (x_0' - x_0) / sqrt(1 - alpha_bar)
    torch.testing.assert_close(of_v.mse, mse(guess.x0, x0) / (1 - alpha_bar).float(), rtol=1e-6, atol=0)


def test_hybrid_of_a_network_that_predicts_v_knows_pure_noise() -> None:
    """alpha_bar_T = 0: x_t is noise alone, and a right answer has the posterior's mean."""
    schedule, t = Schedule("linear", zero_terminal_snr=True), torch.tensor([999])
    x0, noise = torch.rand(2, 1, 3, 4, 4, dtype=torch.float64) * 2 - 1
    v = schedule.velocity(x0, t, noise)
    terms = hybrid_loss(schedule, torch.cat([v, -torch.ones_like(v)], dim=1), x0, t, noise, "v_prediction")
    assert terms.vb.abs().max() < 1e-12                               # var_frac = 0 is the posterior's own variance
    with pytest.raises(DiffusionError, match="predicted noise says nothing about pure noise"):
        hybrid_loss(schedule, torch.cat([v, v], dim=1), x0, t, noise)


def test_hybrid_needs_a_variance() -> None:
    x0, t = torch.zeros(1, 4, 2, 2), torch.tensor([3])
    with pytest.raises(DiffusionError, match="answers 8 channels of 4, this one 4: take `mse`"):
        hybrid_loss(Schedule("linear"), x0, x0, t, x0)


def test_hybrid_trains_the_mean_by_the_error_alone() -> None:
    schedule, t = Schedule("squaredcos_cap_v2", steps=100), torch.tensor([0, 60])
    x0, noise = torch.rand(2, 2, 3, 4, 4) * 2 - 1
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    terms = hybrid_loss(schedule, output, x0, t, noise)
    by_mse, by_vb = (torch.autograd.grad(term.sum(), output, retain_graph=True)[0] for term in terms)
    assert by_mse[:, 3:].abs().max() == 0
    assert by_vb[:, :3].abs().max() == 0
    assert by_vb[:, 3:].abs().min() > 0
    x_t = schedule.q_sample(x0, t, noise)
    predicted = Prediction.from_eps(x_t, output[:, :3], schedule.alpha_bar(t)).x0
    full = variational_bound(schedule, predicted, (output[:, 3:] + 1) / 2, x0, x_t, t)
    torch.testing.assert_close(terms.vb, full * 0.1)  # T / 1000


def test_a_schedule_that_begins_clean_has_no_bound() -> None:
    """The variance of the step to its clean level is 0, and its logarithm made the bound nan."""
    schedule, x0 = Schedule("scaled_linear", steps=4), torch.zeros(2, 3, 4, 4)
    schedule.alphas_bar = [1.0, 0.5, 0.2, 0.1]
    with pytest.raises(DiffusionError, match="adds none at time 0, with alpha_bar = 1"):
        hybrid_loss(schedule, torch.zeros(2, 6, 4, 4), x0, torch.tensor([1, 2]), x0, "v_prediction")


def test_the_normal_distribution_is_that_of_gelu() -> None:
    """torch's GELU has the same approximation, x cdf(x)."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(x * _normal_cdf(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-12)    # float64


def test_two_times_of_one_noise_have_no_bound() -> None:
    schedule, x = Schedule("scaled_linear", steps=4), torch.zeros(1, 1, 2, 2)
    schedule.alphas_bar = [0.9, 0.5, 0.5, 0.1]
    with pytest.raises(DiffusionError, match="adds none at time 2, with alpha_bar = 0.5"):
        variational_bound(schedule, x, x, x, x, torch.tensor([2]))
