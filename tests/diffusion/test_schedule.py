"""Schedules: their formulas, identities of the forward process, and what bad input gets. All in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion import LAST, DiffusionError, Schedule, default_levels, karras
from diffusion.schedule import NAMES

EXACT = 1e-14  # a few roundings of float64, of numbers near 1

schedules = st.builds(Schedule, st.sampled_from(NAMES), zero_terminal_snr=st.booleans())


@pytest.mark.parametrize(
    ("name", "first", "last", "alpha_bar_last"),
    [
        ("linear", 1e-4, 0.02, 4.0358e-5),  # Ho et al. 2020: L_T rests on alpha_bar_T = 4e-5
        ("scaled_linear", 0.00085, 0.012, 0.0046600),  # Stable Diffusion: sigma_max = 14.6146
        ("squaredcos_cap_v2", 4.1284e-5, 0.999, 2.4285e-9),
    ],
)
def test_published_values(name: str, first: float, last: float, alpha_bar_last: float) -> None:
    schedule = Schedule(name)
    assert schedule.betas.dtype == schedule.alphas_bar.dtype == torch.float64
    assert schedule.betas[0].item() == pytest.approx(first, rel=1e-4)  # the values above have five digits
    assert schedule.betas[-1].item() == pytest.approx(last, rel=1e-4)
    assert schedule.alphas_bar[-1].item() == pytest.approx(alpha_bar_last, rel=1e-4)


def test_sigma_max_of_stable_diffusion() -> None:
    assert Schedule("scaled_linear").level(999).sigma == pytest.approx(14.6146, abs=1e-4)   # as published


def test_linear_keeps_its_end_at_other_lengths() -> None:
    assert Schedule("linear", steps=np.int64(250)).betas[0].item() == pytest.approx(4e-4)       # of NumPy's, too
    assert Schedule("linear", steps=250).betas[-1].item() == pytest.approx(0.08)


@given(schedules)
def test_tables(schedule: Schedule) -> None:
    assert bool((schedule.betas > 0).all())
    assert bool((schedule.betas <= 1).all())
    assert bool((schedule.alphas_bar.diff() < 0).all())
    product = torch.cumprod(1 - schedule.betas, 0)
    torch.testing.assert_close(product, schedule.alphas_bar, rtol=1e-9, atol=1e-15)  # 1000 roundings


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_is_exact_and_keeps_the_first(name: str) -> None:
    plain, zero = Schedule(name), Schedule(name, zero_terminal_snr=True)
    assert zero.alphas_bar[-1].item() == 0.0
    assert zero.betas[-1].item() == 1.0
    assert zero.alphas_bar[0].item() == pytest.approx(plain.alphas_bar[0].item(), rel=EXACT)
    assert zero.level(999).sigma == math.inf
    noise, x0 = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    t = torch.tensor([999, 999])
    assert torch.equal(zero.q_sample(x0, t, noise), noise)
    assert torch.equal(zero.velocity(x0, t, noise), -x0)


def test_time_minus_one_is_clean() -> None:
    schedule = Schedule("scaled_linear")
    x0, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([-1, -1])
    assert torch.equal(schedule.q_sample(x0, t, noise), x0)
    assert schedule.level(-1) == LAST
    assert LAST.sigma == 0.0


@given(schedules, st.integers(0, 999))
def test_forward_process_is_a_rotation(schedule: Schedule, time: int) -> None:
    """(x_t, v) is (x_0, eps) turned by one angle, so it keeps the length and gives both back."""
    x0, noise = torch.randn(2, 1, 3, 2, dtype=torch.float64).unbind(0)
    t = torch.tensor([time])
    x0, noise = x0[None], noise[None]
    x_t, v = schedule.q_sample(x0, t, noise), schedule.velocity(x0, t, noise)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + noise**2, rtol=EXACT, atol=EXACT)
    cosine, sine = schedule.alpha_bar(t) ** 0.5, (1 - schedule.alpha_bar(t)) ** 0.5
    torch.testing.assert_close(cosine * x_t - sine * v, x0, rtol=EXACT, atol=10 * EXACT)


def test_each_sample_has_its_own_time() -> None:
    schedule = Schedule("linear")
    x0, noise, t = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([7, 0, 999])
    batch = schedule.q_sample(x0, t, noise)
    for i in range(3):
        assert torch.equal(batch[i], schedule.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1])[0])


def test_float16_gets_float64_coefficients() -> None:
    """A float16 table is 7 % off at the last step; a coefficient cast once is off by float16's rounding,
    2^-11."""
    schedule = Schedule("scaled_linear")
    x0 = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    x_t = schedule.q_sample(x0, torch.tensor([999]), torch.zeros_like(x0))
    assert x_t.dtype == torch.float16
    assert x_t.item() == pytest.approx(schedule.alphas_bar[-1].sqrt().item(), rel=2**-11)


def test_levels_between_whole_times() -> None:
    schedule = Schedule("scaled_linear")
    assert schedule.level(500).alpha_bar == schedule.alphas_bar[500].item()
    middle = schedule.level(500.25).sigma
    assert middle == pytest.approx(
        0.75 * schedule.level(500).sigma + 0.25 * schedule.level(501).sigma, rel=EXACT
    )


def test_snr() -> None:
    schedule = Schedule("squaredcos_cap_v2")
    t = torch.tensor([3, 500])
    expected = [schedule.level(i).sigma ** -2 for i in (3, 500)]
    torch.testing.assert_close(schedule.snr(t), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schedule("cosine"), "no schedule is called 'cosine'; there are linear"),
        (lambda: Schedule("linear", steps=0), "at least 1, not 0"),
        (lambda: Schedule("linear", steps=True), "at least 1, not True"),
        (lambda: Schedule("linear", steps=10), "0.01 to 2"),  # the published end times 1000 / 10
        (lambda: Schedule("linear", steps=10, beta_end=1.0), "0.01 to 1$"),
        (lambda: Schedule("linear", beta_start=0.0), "runs from 0 to 0.02"),     # said, and so not the published one
        (lambda: Schedule("linear", beta_end=0), "from 0.0001 to 0$"),
        (lambda: Schedule("scaled_linear", beta_start="0.00085"), "betas are numbers, not '0.00085' and 0.012"),
        (lambda: Schedule("squaredcos_cap_v2", beta_end=0.01), "takes no beta_start"),
        (lambda: Schedule("scaled_linear", steps=1, zero_terminal_snr=True), "at least 2 steps"),
        (lambda: Schedule("linear").alpha_bar(torch.tensor([1000])), "between -1 and 999"),
        (lambda: Schedule("linear").alpha_bar(torch.tensor([-2])), "between -1 and 999"),
        (lambda: Schedule("linear").alpha_bar(torch.tensor([0.5])), "whole times"),
        (lambda: Schedule("linear").snr(500), "times are a tensor .*, not 500: a single one has its `level`"),
        (lambda: Schedule("linear").level(999.5), "between 0 and 999"),
        (lambda: Schedule("linear").level(-0.5), "between 0 and 999"),
        (lambda: Schedule("linear", zero_terminal_snr=True).level(998.5), "infinite sigma"),
        (
            lambda: Schedule("linear").q_sample(torch.zeros(3, 1), torch.tensor([1, 2]), torch.zeros(3, 1)),
            "2 times were given for a batch of 3",
        ),
        (
            lambda: Schedule("linear").q_sample(torch.zeros(3, 1), torch.ones(3, 1).long(), torch.zeros(3, 1)),
            r"times \(3, 1\) were given for a batch of 3: give \(3,\)",
        ),
        (   # as pixels are read: multiplied by coefficients of 0, they were black
            lambda: Schedule("linear").q_sample(torch.ones(1, 3).byte(), torch.tensor([1]), torch.zeros(1, 3)),
            "a batch of torch.uint8 has no noise levels: give floats",
        ),
        (lambda: Schedule("linear").velocity(torch.ones(1, 3).long(), torch.tensor([1]), torch.zeros(1, 3)), "int64"),
        (   # one noise for all
            lambda: Schedule("linear").q_sample(torch.zeros(2, 3), torch.tensor([1, 2]), torch.zeros(1, 3)),
            r"noise is like x_0, torch.float32 \(2, 3\), a number of its own for each; this is torch.float32 \(1, 3\)",
        ),
        (
            lambda: Schedule("linear").velocity(torch.zeros(2, 3), torch.tensor([1, 2]), torch.zeros(2, 3).double()),
            r"this is torch.float64 \(2, 3\)",
        ),
    ],
)
def test_refused(make: object, sentence: str) -> None:
    with pytest.raises(DiffusionError, match=sentence):
        make()


def test_another_table_is_read_everywhere() -> None:
    """By levels, from which is drawn, and by whole times, at which is learned: the second kept the first table."""
    schedule, own, t = Schedule("linear", steps=50), torch.linspace(0.9, 0.1, 50).double(), torch.tensor([30, -1])
    schedule.alphas_bar = own
    assert schedule.alpha_bar(t).tolist() == [schedule.level(30).alpha_bar, 1.0] == [own[30].item(), 1.0]
    assert torch.cumprod(1 - schedule.betas, 0).tolist() == pytest.approx(own.tolist(), rel=1e-13)      # 50 products
    assert "betas 0.1 to 0.14" in repr(schedule)                                            # 0.9, 0.116327 and 0.1
    with pytest.raises(AttributeError, match="betas"):
        schedule.betas = own


def test_after_nothing_but_noise_beta_is_one() -> None:
    schedule = Schedule("scaled_linear", steps=4)
    schedule.alphas_bar = [1.0, 0.5, 0.0, 0.0]
    assert schedule.betas.tolist() == [0.0, 0.5, 1.0, 1.0]
    schedule.alphas_bar = [1.0, 0.5, 0.2, 0.1]
    with pytest.raises(DiffusionError, match=r"sigma.* above 0, and this schedule begins with alpha_bar = 1"):
        karras(schedule, 2)


def test_another_table_is_float64_and_its_end_is_what_counts() -> None:
    schedule = Schedule("linear", steps=50)
    schedule.alphas_bar = [1 - i / 49 for i in range(50)]                                   # ends in pure noise
    assert schedule.alpha_bar(torch.tensor([49])).dtype == torch.float64
    first, *_, last = default_levels(schedule, "ddim", 7)
    assert (first.t, first.alpha_bar, last.t) == (49, 0, -1)                                # trailing times


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (torch.linspace(0.9, 0.1, 49), r"holds \(50,\) numbers, not \(49,\)"),
        (torch.linspace(0.1, 0.9, 50), "from 1 to 0, none above the one before"),
        (torch.linspace(1.1, 0.1, 50), "from 1 to 0"),
        (torch.full((50,), math.nan), "from 1 to 0"),
    ],
)
def test_a_table_that_is_none_is_refused(table: torch.Tensor, sentence: str) -> None:
    schedule = Schedule("linear", steps=50)
    with pytest.raises(DiffusionError, match=sentence):
        schedule.alphas_bar = table
