"""Lists of times, against diffusers for every number of steps, and against GLIDE's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffusion import (
    LAST,
    SAMPLERS,
    DiffusionError,
    Schedule,
    default_levels,
    from_strength,
    karras,
    leading,
    linspace,
    respaced,
    trailing,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs

CASE = json.loads((Path(__file__).parents[1] / "fixtures" / "diffusion_math.json").read_text())
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("n", [2, 3, 7, 10, 27, 50, 333, 999])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacings_of_diffusers(spacing: str, n: int) -> None:
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    ours = {"leading": leading, "linspace": linspace, "trailing": trailing}[spacing](1000, n)
    assert ours == [*scheduler.timesteps.tolist(), -1]


def test_rounding_is_numpys() -> None:
    for n in range(2, 1001):
        assert linspace(1000, n)[:-1] == np.linspace(0, 999, n).round()[::-1].tolist()
        assert trailing(1000, n)[:-1] == (np.arange(1000, 0, -1000 / n).round()[:n] - 1).tolist()


def test_offset_and_terminal() -> None:
    scheduler = DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    assert leading(1000, 50, offset=1, terminal=0) == [*scheduler.timesteps.tolist(), 0]
    assert leading(1000, 50, offset=1)[0] == 981


def test_one_step_starts_in_the_noise() -> None:
    assert linspace(1000, 1) == [999, -1]
    assert trailing(1000, 1) == [999, -1]
    assert respaced("1") == respaced(" 1") == [999, -1]
    assert respaced("1", steps=1) == [0, -1]


@pytest.mark.parametrize("spec", CASE["respacing"])
def test_respaced_as_published(spec: str) -> None:
    assert respaced(spec) == [*reversed(CASE["respacing"][spec]), -1]


def test_sections() -> None:
    assert respaced("10,10,3,2,2")[:6] == [999, 800, 799, 600, 599, 500]
    assert respaced("fast27")[:6] == [997, 800, 799, 600, 599, 500]
    assert respaced("2,2", steps=7) == [6, 4, 3, 0, -1]  # the first sections take what is left over
    assert respaced("1,2", steps=4) == [3, 2, 0, -1]


def test_the_steps_that_a_strength_is_told_to_take_are_enough() -> None:
    for part in range(2, 1000):
        with pytest.raises(DiffusionError, match="take at least") as refused:
            from_strength([1.0, -1.0], 1 / part)
        enough = int(str(refused.value).rsplit(" ", 1)[1])
        assert len(from_strength([0.0] * (enough + 1), 1 / part)) == 2
        assert enough in (part, part + 1)


def test_from_strength_counts_as_diffusers() -> None:
    times = leading(1000, 50)
    assert from_strength(times, 1.0) == times
    assert from_strength(times, 0.75) == times[50 - int(50 * 0.75) :]
    assert from_strength(times, 0.02) == [0, -1]


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("n", [1, 5, 20])
def test_karras(name: str, n: int) -> None:
    ends = SD if name == "scaled_linear" else {"beta_schedule": "linear"}
    scheduler = DPMSolverMultistepScheduler(**ends, use_karras_sigmas=True)
    scheduler.set_timesteps(n)
    levels = karras(Schedule(name), n)
    sigmas = np.array([level.sigma for level in levels])
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=2e-4)  # diffusers' tables are float32
    assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist()
    assert levels[-1] == LAST


def test_defaults_are_those_of_stable_diffusion() -> None:
    schedule = Schedule("scaled_linear")
    for n in (4, 20, 50):
        euler = EulerDiscreteScheduler(**SD, steps_offset=1)
        euler.set_timesteps(n)
        ours = default_levels(schedule, "euler", n)
        np.testing.assert_allclose([x.t for x in ours[:-1]], euler.timesteps, rtol=1e-7)  # float32 times
        np.testing.assert_allclose([x.sigma for x in ours], euler.sigmas, rtol=2e-4)  # float32 tables
        solver = DPMSolverMultistepScheduler(**SD, steps_offset=1)
        solver.set_timesteps(n)
        assert [x.t for x in default_levels(schedule, "dpmpp_2m", n)] == [*solver.timesteps.tolist(), -1]
        assert [x.t for x in default_levels(schedule, "ddpm", n)] == leading(1000, n, 1)
        assert [x.t for x in default_levels(schedule, "plms", n)] == leading(1000, n, 1, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("zero", [False, True])
def test_defaults_descend_for_every_number_of_steps(sampler: str, zero: bool) -> None:
    schedule = Schedule("scaled_linear", steps=40, zero_terminal_snr=zero)
    for n in range(1, 40):
        levels = default_levels(schedule, sampler, n)
        assert len(levels) == n + 1
        assert all(a.alpha_bar < b.alpha_bar for a, b in zip(levels, levels[1:]))
        assert levels[0].t == 39 or sampler in ("ddim", "ddpm", "plms")
        if zero:
            assert levels[0].alpha_bar == 0


def test_all_times_can_be_taken() -> None:
    for sampler in ("ddpm", "ddim", "plms"):                                # one up they would begin past the last
        assert [x.t for x in default_levels(Schedule("linear", 40), sampler, 40)][:-1] == [*reversed(range(40))]


def test_a_schedule_of_one_time() -> None:
    schedule = Schedule("linear", 1, 0.5, 0.5)
    assert karras(schedule, 1) == [schedule.level(0), schedule.level(-1)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: leading(1000, 1001), "take between 1 and 1000"),
        (lambda: trailing(1000, 0), "take between 1 and 1000"),
        (lambda: leading(1000, 1000, offset=1), "begin at time 1000, past 999"),
        (lambda: respaced("fast"), "is no spacing"),
        (lambda: respaced("10,,3"), "is no spacing"),
        (lambda: respaced("ddim999"), "gives exactly 999"),
        (lambda: respaced("300,2,2,2"), "250 times cannot give 300 steps"),
        (lambda: respaced("0"), "cannot give 0 steps"),
        (lambda: leading(1000, 10.0), "10.0 steps do not fit .* a whole number"),
        (lambda: karras(Schedule("linear"), 2.5), "2.5 steps do not fit"),
        (lambda: respaced(100), "a spacing is a text, '100' for as many steps, not 100"),
        (lambda: from_strength([1.0, -1.0], 1.5), "a number above 0 and at most 1, not 1.5"),
        (lambda: from_strength([1.0, -1.0], 0), "a number above 0 and at most 1, not 0"),
        (lambda: from_strength([1.0, -1.0], 0.5), "leaves none of 1 steps: take at least 2"),
        (lambda: default_levels(Schedule("linear"), "heun", 5), "no sampler is called 'heun'; there are ddpm"),
        (lambda: default_levels(Schedule("linear"), "ddim", 2.0), "a whole number of steps, not 2.0"),
        (lambda: default_levels(Schedule("linear"), "ddim", "2"), "a whole number of steps, not '2'"),
        (lambda: karras(Schedule("linear", zero_terminal_snr=True), 5), "finite largest sigma"),
        (lambda: default_levels(Schedule("linear"), "dpmpp_2m", 1000), "1000 steps do not fit dpmpp_2m.* 1 and 999"),
        (lambda: default_levels(Schedule("linear"), "dpmpp_2m", 0), "0 steps do not fit dpmpp_2m"),
    ],
)
def test_refused(make: object, sentence: str) -> None:
    with pytest.raises(DiffusionError, match=sentence):
        make()


@pytest.mark.parametrize("name", ["squaredcos_cap_v2", "scaled_linear"])
def test_a_time_between_two_is_where_the_logarithm_of_sigma_is(name: str) -> None:
    schedule = Schedule(name)
    logs = [math.log(schedule.level(t).sigma) for t in range(schedule.steps)]
    levels = karras(schedule, 30)[:-1]
    wanted = np.interp([math.log(level.sigma) for level in levels], logs, range(schedule.steps))
    assert [level.t for level in levels] == pytest.approx(list(wanted), abs=0.5)     # its times are rounded


def test_karras_over_a_table_that_ends_with_two_alike() -> None:
    schedule = Schedule("scaled_linear", steps=10)
    schedule.alphas_bar = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    assert [level.t for level in karras(schedule, 4)][::4] == [9, -1]
