"""Conversions between eps, x_0 and v, clipping, and a classifier's guide with a known answer. All in
float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion import LAST, DiffusionError, Level, Prediction, Schedule, predict, target

EXACT = 1e-12  # float64 rounding times at most 1 / sqrt(alpha_bar), 15 for Stable Diffusion's schedule


@given(st.integers(0, 999), st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_every_form_gives_x0_and_eps_back(time: int, form: str) -> None:
    schedule, t = Schedule("scaled_linear"), torch.tensor([time, 999 - time])
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    x_t = schedule.q_sample(x0, t, noise)
    prediction = predict(form, x_t, target(schedule, form, x0, t, noise), schedule.alpha_bar(t))
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=EXACT)
    torch.testing.assert_close(prediction.eps, noise, rtol=0, atol=100 * EXACT)  # / sqrt(1 - alpha_bar_0), 34


def test_pure_noise_is_exact_for_v() -> None:
    x_t, v = torch.randn(2, 1, 3, 2, 2)
    prediction = Prediction.from_v(x_t, v, 0.0)
    assert torch.equal(prediction.x0, -v)
    assert torch.equal(prediction.eps, x_t)


@pytest.mark.parametrize("alpha_bar", [0.0, torch.tensor([0.5, 0.0], dtype=torch.float64)])
def test_pure_noise_is_refused_for_eps(alpha_bar: float | torch.Tensor) -> None:
    with pytest.raises(DiffusionError, match="zero terminal SNR needs"):
        Prediction.from_eps(torch.zeros(2, 1), torch.zeros(2, 1), alpha_bar)


@pytest.mark.parametrize("alpha_bar", [0.3, 0.0])
def test_clamped_is_consistent(alpha_bar: float) -> None:
    x_t, v = 3 * torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    level = Level(5.0, alpha_bar)
    clamped = replace(Prediction.from_v(x_t, v, alpha_bar), guide=v, var_frac=x_t).clamped(x_t, level)
    assert clamped.x0.abs().max() == 1
    again = alpha_bar**0.5 * clamped.x0 + (1 - alpha_bar) ** 0.5 * clamped.eps
    torch.testing.assert_close(again, x_t, rtol=0, atol=EXACT)
    assert clamped.guide is v
    assert clamped.var_frac is x_t


def test_guided_is_the_posterior_given_the_class() -> None:
    """x_0 ~ N(0, 1) and y = x_0 + r n: with the exact gradient of log p(y | x_t) the guided x_0 is E[x_0
    | x_t, y]."""
    a, r2, y = 0.37, 0.25, 1.3
    x_t = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    mean, variance = a**0.5 * x_t, 1 - a  # of x_0 given x_t
    guide = (y - mean) / (variance + r2) * a**0.5
    prediction = replace(Prediction.from_x0(x_t, mean, a), guide=guide).guided(x_t, Level(0.0, a))
    expected = mean + variance / (variance + r2) * (y - mean)  # Kalman's gain
    torch.testing.assert_close(prediction.x0, expected, rtol=0, atol=EXACT)
    again = a**0.5 * prediction.x0 + (1 - a) ** 0.5 * prediction.eps
    torch.testing.assert_close(again, x_t, rtol=0, atol=EXACT)
    assert prediction.guide is None


def test_a_guide_has_no_score_to_be_added_to_where_all_is_noise() -> None:
    """Of a network that predicts v, which can be asked there: the message must not send for one."""
    x_t, level = torch.randn(1, 1, 2, 2), Level(999.0, 0.0)
    carried = replace(Prediction.from_v(x_t, x_t, 0.0), guide=x_t)
    with pytest.raises(DiffusionError, match="a gradient added to the score of pure noise .* ancestral steps"):
        carried.guided(x_t, level)


def test_a_learned_variance_lies_between_0_and_1() -> None:
    """The network's u in [-1, 1] weighs the two logarithms by (u + 1) / 2 (openai/guided-diffusion at 22e0df8)."""
    x_t, eps = torch.randn(2, 1, 3, 1, 1, dtype=torch.float64)
    u = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    prediction, plain = (predict("epsilon", x_t, output, 0.3) for output in (torch.cat([eps, u], dim=1), eps))
    assert prediction.var_frac.flatten().tolist() == [0, 0.75, 1]
    assert torch.equal(prediction.x0, plain.x0)
    assert plain.var_frac is None


def test_unknown_form() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(DiffusionError, match="no network predicts 'velocity' here; there are epsilon"):
        predict("velocity", x, x, 0.5)
    with pytest.raises(DiffusionError, match="no network predicts 'velocity' here"):
        target(Schedule("linear"), "velocity", x, torch.tensor([0]), x)


def test_what_is_clean_has_no_noise_to_be_known_from_x0() -> None:
    x, ones = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, dtype=torch.float64)
    for alpha_bar in (1.0, ones):
        with pytest.raises(DiffusionError, match=r"x_0 says nothing about the noise where there is none"):
            Prediction.from_x0(x, x, alpha_bar)
    clamped = Prediction(4 * x, x).clamped(x, LAST)                # where what is drawn is turned back into noise
    assert torch.equal(clamped.x0, torch.ones_like(x))
    assert torch.equal(clamped.eps, x)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 4, 4), (1, 2, 4, 4), (2, 2, 4, 1), (2, 5, 4, 4)])
def test_an_answer_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    x_t = torch.zeros(2, 2, 4, 4)
    with pytest.raises(DiffusionError, match=r"answers x_t \(2, 2, 4, 4\) alike"):
        predict("epsilon", x_t, torch.zeros(shape), 0.5)


@pytest.mark.parametrize("clip", [False, True])
def test_another_eps_brings_its_x0(clip: bool) -> None:
    x_t, eps, level = 3 * torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5), Level(3, 0.25)
    given = replace(Prediction(x_t, x_t), guide=x_t, var_frac=eps)
    found = (given.clamped(x_t, level) if clip else given).with_eps(x_t, eps, level)
    x0 = (3 - 0.75**0.5 * 0.5) / 0.5
    assert (found.guide is x_t, found.var_frac is eps, found.clipped) == (True, True, clip)
    torch.testing.assert_close(found.x0, torch.full_like(x_t, 1.0 if clip else x0))
    torch.testing.assert_close(0.5 * found.x0 + 0.75**0.5 * found.eps, x_t)
