"""Samplers on data with an exact denoiser, in float64: what they must reach, how fast, and with which
draws."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import (
    LAST,
    SAMPLERS,
    Denoiser,
    DiffusionError,
    Level,
    Prediction,
    Schedule,
    ddim,
    ddim_step,
    ddpm,
    ddpm_step,
    default_levels,
    dpmpp_2m,
    dpmpp_2m_step,
    draw,
    euler,
    euler_ancestral,
    last,
    leading,
    linspace,
    plms,
    trailing,
)
from diffusion.posterior import posterior_variance

_spec = importlib.util.spec_from_file_location("gaussian", Path(__file__).parent / "gaussian.py")
gaussian = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gaussian)

SD = Schedule("scaled_linear")
DETERMINISTIC = [ddim, euler, plms, dpmpp_2m]


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 4, 4)), dtype=torch.float64)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("zero", [False, True])
def test_one_point_is_reached_exactly(sampler: object, zero: bool) -> None:
    """All data at one point: eps is constant along the path, so every deterministic step is exact,
    however long."""
    schedule = Schedule("scaled_linear", zero_terminal_snr=zero)
    x = last(sampler(gaussian.denoiser(0.0), noise(), schedule.levels(trailing(1000, 4))))
    torch.testing.assert_close(x, torch.full_like(x, gaussian.MEAN), rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2), (plms, 2)])
def test_order_of_convergence(sampler: object, order: int) -> None:
    """Twice the steps divide the error by 2^order; measured away from the last, always first-order, step.

    PLMS shows the second order of its start; its inner steps are of fourth.
    """
    x, errors = noise(), []
    for n in (80, 160):
        levels = [SD.level(t) for t in torch.linspace(900, 300, n + 1).tolist()]
        expected = gaussian.transport(x, 0.5, levels[0], levels[-1])
        errors.append((last(sampler(gaussian.denoiser(0.5), x, levels)) - expected).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.03  # what the next order leaves at 80 steps
    assert errors[1] < (2.5e-3 if order == 1 else 2.5e-5)


def test_an_image_is_encoded_into_the_noise_that_draws_it() -> None:
    """Upwards, too, the step is of first order; `ddim` finds the way back."""
    x_s, denoise, errors = gaussian.MEAN + 0.5 * noise(), gaussian.denoiser(0.5), []
    for n in (80, 160):
        levels = [SD.level(t) for t in torch.linspace(900, 20, n + 1).tolist()]
        x = x_s
        for level, noisier in zip(levels[:0:-1], levels[-2::-1]):
            x = ddim_step(x, denoise(x, level), level, noisier)
        there, back = gaussian.transport(x_s, 0.5, levels[-1], levels[0]) - x, last(ddim(denoise, x, levels)) - x_s
        errors.append((there.abs().max().item(), back.abs().max().item()))
    for coarse, fine in zip(*errors):
        assert abs(math.log2(coarse / fine) - 1) < 0.1      # what the next order leaves at 80 steps
        assert fine < 0.05                                  # of a deviation of 1, which a wrong direction would miss


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero", [False, True])
def test_defaults_reach_the_data(sampler: str, zero: bool) -> None:
    """40 000 draws of N(0.7, 0.5²) in 60 steps; their own errors are 0.0025 in the mean, 0.002 in the
    deviation."""
    schedule = Schedule("scaled_linear", zero_terminal_snr=zero)
    levels = default_levels(schedule, sampler, 60)
    generator = torch.Generator().manual_seed(1)
    x = last(SAMPLERS[sampler](gaussian.denoiser(0.5), noise(1, 1, 200, 200), levels, generator=generator))
    # a start from N(0, 1) forgets sqrt(alpha_bar) MEAN, up to 0.06, and the chain carries 60 % of that along
    assert abs(x.mean().item() - gaussian.MEAN) < (0.01 if zero else 0.04)
    # first-order chains: 0.045 here and 0.011 with 400 steps for the ancestral ones, the others less
    assert abs(x.std().item() - 0.5) < 0.05


@pytest.mark.parametrize("zero", [False, True])
def test_large_variance_is_exact_for_unit_gaussians(zero: bool) -> None:
    """For N(0, 1) data p(x_s | x_t) has variance beta, so any list of times keeps N(0, 1) (Ho et al.
    2020, 3.2)."""
    schedule, scale = Schedule("linear", zero_terminal_snr=zero), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    levels = schedule.levels(trailing(1000, 7))

    def step(x: float, z: float, variance: str, level: Level, lower: Level) -> float:
        prediction = Prediction.from_x0(x * scale, level.alpha_bar**0.5 * x * scale, level.alpha_bar)
        return ddpm_step(x * scale, prediction, level, lower, z * scale, variance).item()

    for level, lower in zip(levels[:-2], levels[1:-1]):
        total = step(1, 0, "large", level, lower) ** 2 + step(0, 1, "large", level, lower) ** 2
        assert total == pytest.approx(1, abs=1e-12)   # float64
        assert step(0, 1, "small", level, lower) < step(0, 1, "large", level, lower)


def test_small_variance_is_exact_for_one_point() -> None:
    """For one point p(x_s | x_t) is the posterior: the chain's marginals are q(x_t | x_0) at every level."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    denoise, variance = gaussian.denoiser(0.0), 1.0
    levels = [Level(999, 0.0), *SD.levels(linspace(1000, 9))[1:]]
    for level, lower in zip(levels, levels[1:]):
        prediction = [replace(denoise(x * one, level), eps=one) for x in (0, 1)]
        at_zero, at_one = (
            ddpm_step(x * one, p, level, lower, 0 * one).item() for x, p in zip((0, 1), prediction)
        )
        drawn = ddpm_step(0 * one, prediction[0], level, lower, one).item() - at_zero
        variance = (at_one - at_zero) ** 2 * variance + drawn**2
        assert variance == pytest.approx(1 - lower.alpha_bar, abs=1e-12)    # float64, through 9 steps


def test_ddpm_small_is_ddim_with_eta_one() -> None:
    levels, x = SD.levels(leading(1000, 20)), noise()
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    a = last(ddpm(gaussian.denoiser(0.5), x, levels, generator=one))
    b = last(ddim(gaussian.denoiser(0.5), x, levels, generator=two, eta=1.0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)  # the same step written in two ways


def curved(x_t: Tensor, level: Level) -> Prediction:
    """A denoiser without a closed form, for identities between samplers."""
    v = torch.tanh(x_t.roll(1, 1) + level.t / 1000)
    return Prediction.from_v(x_t, v, level.alpha_bar)


def guided(denoise: Denoiser, scale: float) -> Denoiser:
    return lambda x, level: replace(denoise(x, level), guide=scale * (0.3 - x))


def test_euler_in_sigma_space() -> None:
    """k-diffusion's own coordinates, x / sqrt(alpha_bar): Euler, and Euler to sigma_down with noise back
    up."""
    levels, x = SD.levels(linspace(1000, 12, whole=False)), noise()
    draws = draw((12, *x.shape), torch.Generator().manual_seed(5), torch.float64)
    for ancestral in (False, True):
        ve = x / levels[0].alpha_bar ** 0.5
        for z, level, lower in zip(draws, levels, levels[1:]):
            slope = curved(ve * level.alpha_bar**0.5, level).eps
            up2 = lower.sigma**2 * (level.sigma**2 - lower.sigma**2) / level.sigma**2 if ancestral else 0.0
            ve = ve + slope * ((lower.sigma**2 - up2) ** 0.5 - level.sigma) + up2**0.5 * z
        generator = torch.Generator().manual_seed(5)
        ours = last((euler_ancestral if ancestral else euler)(curved, x, levels, generator=generator))
        torch.testing.assert_close(
            ours, ve, rtol=0, atol=1e-11
        )  # sigma is 14.6 at most, times float64's rounding


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_guide_is_a_change_of_score(sampler: object) -> None:
    """Deterministic samplers treat a prediction with a guide as the guided prediction itself."""
    levels, x = SD.levels(leading(1000, 10, 1, 0)), noise()
    carried = guided(curved, 0.4)
    folded = lambda x, level: carried(x, level).guided(x, level)  # noqa: E731
    a, b = last(sampler(carried, x, levels)), last(sampler(folded, x, levels))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert (a - last(sampler(curved, x, levels))).abs().max() > 0.01


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_a_guide_shifts_the_ancestral_mean(variance: str) -> None:
    level, lower, (x, z, guide) = SD.level(500), SD.level(400), noise(3, 2, 1, 4, 4)
    plain = replace(curved(x, level), var_frac=torch.full_like(x, 0.25))
    step = [
        ddpm_step(x, replace(plain, guide=g), level, lower, n * z, variance)
        for g, n in ((None, 0), (None, 1), (guide, 0))
    ]
    shift, deviation = step[2] - step[0], (step[1] - step[0]) / z
    # float64; both are differences of numbers near 1, and a deviation is 1e-2 or more
    torch.testing.assert_close(shift, deviation**2 * guide, rtol=1e-9, atol=1e-12)


def test_the_last_learned_variance_is_that_of_the_step_before() -> None:
    """Into the clean level the posterior has no variance; a guide is weighed as by guided-diffusion."""
    levels, (x, guide) = SD.levels([500, 400, -1]), noise(2, 2, 1, 4, 4)

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        here = guide if level.t == 400 and guide is not None else None
        return replace(curved(x_t, level), var_frac=torch.zeros_like(x_t), guide=here)

    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    carried = last(ddpm(denoise, x, levels, variance="learned", generator=one))
    shift, guide = guide, None
    plain = last(ddpm(denoise, x, levels, variance="learned", generator=two))
    expected = posterior_variance(levels[0].alpha_bar, levels[1].alpha_bar) * shift
    torch.testing.assert_close(carried - plain, expected, rtol=1e-9, atol=1e-12)    # float64 differences, as above


def test_the_solver_without_a_past_is_ddim() -> None:
    level, lower, (x, guide) = SD.level(500), SD.level(400), noise(2, 2, 1, 4, 4)
    prediction = replace(curved(x, level), guide=guide)
    ours, expected = (step(x, prediction, level, lower) for step in (dpmpp_2m_step, ddim_step))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)   # float64, one step in two forms


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_what_draws_nothing_leaves_the_generator_alone(sampler: object) -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    last(sampler(curved, noise(), SD.levels([500, 400, -1]), generator=generator))
    assert torch.equal(generator.get_state(), before)


def test_learned_variance_lies_between() -> None:
    level, lower, (x, z) = SD.level(500), SD.level(400), noise(2, 2, 1, 4, 4)

    def deviation(fraction: float | None, variance: str) -> float:
        frac = None if fraction is None else torch.full_like(x, fraction)
        prediction = replace(curved(x, level), var_frac=frac)
        steps = [ddpm_step(x, prediction, level, lower, n * z, variance) for n in (0, 1)]
        return ((steps[1] - steps[0]) / z).mean().item()

    small, large = deviation(None, "small"), deviation(None, "large")
    assert deviation(0.0, "learned") == pytest.approx(small)
    assert deviation(1.0, "learned") == pytest.approx(large)
    assert deviation(0.5, "learned") == pytest.approx((small * large) ** 0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_states(sampler: str) -> None:
    levels, x = default_levels(SD, sampler, 5), noise()
    states = list(SAMPLERS[sampler](curved, x, levels, generator=torch.Generator().manual_seed(0)))
    assert [s.index for s in states] == [0, 1, 2, 3, 4]
    assert all(s.total == 5 for s in states)
    assert [s.level for s in states] == levels[1:]
    assert all(s.x.shape == x.shape and s.x.dtype == x.dtype for s in states)


def test_plms_asks_once_more() -> None:
    asked: list[float] = []

    def denoise(x: Tensor, level: Level) -> Prediction:
        asked.append(level.t)
        return curved(x, level)

    last(plms(denoise, noise(), SD.levels(leading(1000, 4))))
    assert asked == [750, 500, 500, 250, 0]
    asked.clear()
    last(plms(denoise, noise(), SD.levels(leading(1000, 1))))
    assert asked == [0]


def test_plms_starts_after_a_plain_step_from_pure_noise() -> None:
    levels, x = Schedule("scaled_linear", zero_terminal_snr=True).levels(trailing(1000, 5)), noise()
    after = ddim_step(x, curved(x, levels[0]), *levels[:2])
    assert torch.equal(last(plms(curved, x, levels)), last(plms(curved, after, levels[1:])))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_of_a_batch_is_the_image_alone(sampler: str) -> None:
    x, levels = noise(3, 1, 4, 4), default_levels(SD, sampler, 4)

    def generators(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = last(SAMPLERS[sampler](curved, x, levels, generator=generators([7, 8, 9])))
    alone = last(SAMPLERS[sampler](curved, x[1:2], levels, generator=generators([8])))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-12)     # float64 in vectors of another length


def test_draws_do_not_depend_on_the_dtype_of_x() -> None:
    """float16 x gets float32 draws, rounded: the same noise as on any other device or in any other
    precision."""
    levels = SD.levels([999, 500])
    of_nothing = lambda x, level: Prediction.from_x0(x, 0 * x, level.alpha_bar)  # noqa: E731
    for x in (torch.zeros(1, 1, 5, 5, dtype=torch.float16), torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16)):
        # where x and x_0 are 0 the noise is all; drawn in 16 bits, torch's last 16 of 25 numbers are others
        found = last(ddpm(of_nothing, x, levels, generator=torch.Generator().manual_seed(4)))
        z = draw(x.shape, torch.Generator().manual_seed(4)).to(x.dtype)
        assert torch.equal(found, posterior_variance(levels[0].alpha_bar, levels[1].alpha_bar) ** 0.5 * z)
    x = torch.randn(1, 1, 8, 8)
    low, high = (
        last(ddim(curved, x.to(dtype), levels, eta=1.0, generator=torch.Generator().manual_seed(4))).float()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert (
        low - high
    ).abs().max() < 0.1  # bfloat16 keeps 8 bits of numbers up to 4; other noise would differ by 4


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: last(ddim(curved, noise(), [LAST])), "at least two levels"),
        (lambda: last(ddim(curved, noise(), linspace(1000, 9))), r"make it by Schedule.levels\(times\)"),
        (lambda: last(dpmpp_2m(curved, noise(), 20)), r"make it by Schedule.levels\(times\)"),
        (lambda: last(ddim(curved, noise(), SD.levels([0, 500]))), r"entry 1 \(time 500\) is not cleaner"),
        (lambda: last(dpmpp_2m(curved, noise(), SD.levels([500, 500, -1]))), "is not cleaner"),
        (lambda: last(ddim(curved, noise(), SD.levels([500, -1]), eta=1.5)), "not at 1.5"),
        (
            lambda: last(ddpm(curved, noise(), SD.levels([500, -1]), variance="learned")),
            "does not predict a variance",
        ),
        (
            lambda: last(ddpm(curved, noise(), SD.levels([500, -1]), variance="tiny")),
            "no variance is called 'tiny'",
        ),
        (lambda: draw((3, 1), [torch.Generator()]), "1 generators were given for a batch of 3"),
        (lambda: draw((1, 3), [torch.Generator()] * 2), "2 generators were given for a batch of 1"),
        (lambda: last(iter(())), "no step"),
    ],
)
def test_refused(run: object, sentence: str) -> None:
    with pytest.raises(DiffusionError, match=sentence):
        run()


def test_terminal_zero_repeats_time_zero() -> None:
    """diffusers' DDIM without an offset ends with a step from time 0 to alpha_bar_0, which changes
    nothing."""
    level, x = SD.level(0), noise()
    # float64: x_0 is x over sqrt(alpha_bar), and comes back
    torch.testing.assert_close(ddim_step(x, curved(x, level), level, level), x, rtol=0, atol=1e-12)
    for sampler in DETERMINISTIC:
        a, b = (last(sampler(curved, x, SD.levels(times))) for times in ([400, 200, 0, 0], [400, 200, 0]))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_learned_variance_that_ends_at_time_zero_is_the_posterior_s_there_too() -> None:
    """That is no clean level, so the variance of the last step is its own and not that of the step before."""
    levels, x = SD.levels([500, 400, 0]), noise()
    lowest = lambda x, level: replace(curved(x, level), var_frac=torch.zeros_like(x))  # noqa: E731
    learned, small = (
        last(ddpm(lowest, x, levels, variance=variance, generator=torch.Generator().manual_seed(3)))
        for variance in ("learned", "small")
    )
    torch.testing.assert_close(learned, small, rtol=0, atol=1e-12)     # float64, one variance and its logarithm's


def test_a_learned_variance_where_the_last_step_stays_at_its_level() -> None:
    """Stable Diffusion's DDIM times end at time 0, which 1000 of them reach before: there is nothing to add there."""
    at_0 = Schedule("linear").level(0)
    x, fraction = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    prediction = replace(Prediction.from_eps(x, 0 * x, at_0.alpha_bar), var_frac=fraction)
    found = last(ddpm(lambda x, level: prediction, x, [at_0, at_0], generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)           # a variance of 1e-20 adds noise of 1e-10


def test_a_step_that_adds_noise_asks_for_it() -> None:
    x = noise()
    step = curved(x, SD.level(500)), SD.level(500), SD.level(400)
    with pytest.raises(DiffusionError, match="eta 0.5 adds noise"):
        ddim_step(x, *step, eta=0.5)
    assert ddim_step(x, *step, eta=0.5, noise=noise()).isfinite().all()


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (lambda x, p, a, b: ddpm_step(x, p, a, b, x), "not from time 200 to time 400: there take ddim_step"),
        (lambda x, p, a, b: ddim_step(x, p, a, b, 1.0, x), "to less noise, not from time 200 to time 400"),
        (lambda x, p, a, b: dpmpp_2m_step(x, p, LAST, b), "log sigma, which a clean level has not"),
        (lambda x, p, a, b: ddpm_step(x, p, Level(0, 1.0), LAST, x), "time 0 is clean .*no noise to draw anew"),
        (lambda x, p, a, b: ddim_step(x, p, Level(0, 1.0), LAST, 1.0, x), "time 0 is clean .*no noise to draw anew"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(step: object, sentence: str) -> None:
    """Up again, as RePaint goes, variances would be negative, and what was returned complex."""
    x = noise()
    levels = SD.level(200), SD.level(400)
    with pytest.raises(DiffusionError, match=sentence):
        step(x, Prediction.from_eps(x, x, levels[0].alpha_bar), *levels)


def test_x0_that_was_clipped_stays_so_where_eps_of_several_steps_are_combined() -> None:
    """Pixels on a cosine schedule, which begins at alpha_bar 2e-9: an error of 1e-3 in eps would be 20 in x_0."""
    schedule, image = Schedule("squaredcos_cap_v2"), torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    wrong = 1e-3 * noise()

    def denoise(x: Tensor, level: Level) -> Prediction:
        eps = Prediction.from_x0(x, image, level.alpha_bar).eps + wrong * (-1) ** int(level.t // 40)
        return Prediction.from_eps(x, eps, level.alpha_bar).clamped(x, level)

    levels = default_levels(schedule, "plms", 25)
    states = list(plms(denoise, noise(), levels))
    for before, state, level in zip([None, *states], states, levels):
        assert state.prediction.x0.abs().max() <= 1
        if before is not None:
            found = level.alpha_bar**0.5 * state.prediction.x0 + (1 - level.alpha_bar) ** 0.5 * state.prediction.eps
            torch.testing.assert_close(found, before.x, rtol=0, atol=1e-12)         # float64
    assert (states[-1].x - image).abs().max() < 0.02        # errors of up to 5e-3, where sigma is at most a few


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral"])
def test_draws_do_not_depend_on_the_dtype_of_the_answer(sampler: str) -> None:
    """A network in float64 makes x so from the first step on; what it draws is drawn as for one in float32."""
    x, levels = torch.randn(1, 1, 4, 4), default_levels(SD, sampler, 4)

    def run(dtype: torch.dtype) -> Tensor:
        return last(SAMPLERS[sampler](lambda x, level: curved(x.to(dtype), level), x, levels, generator=seeded()))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    low, high = run(torch.float32), run(torch.float64)
    assert high.dtype == torch.float64
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-4)        # float32; other noise would differ by 4
