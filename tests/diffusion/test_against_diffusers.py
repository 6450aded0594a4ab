"""Every sampler over whole chains against diffusers' schedulers, both in float64.

diffusers builds its tables in float32 and some of its steps cast to float32, so each scheduler's module is
run with `torch.float32` and `np.float32` reading as float64. What is left is rounding: bound 1e-10, since a
chain of 20 steps multiplies float64's 1e-16 by at most 1 / sqrt(alpha_bar) = 15 (1e3 at the steepest of the
cosine schedule).
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import (
    Level,
    Prediction,
    Schedule,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    karras,
    last,
    leading,
    linspace,
    plms,
    predict,
    trailing,
)
from diffusion.steps import ddim_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs

BOUND = 1e-10
SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FORMS = pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
ZERO = pytest.mark.parametrize("zero", [False, True])


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module: object) -> None:
        self.module = module

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, "float64" if name == "float32" else name)


@contextmanager
def scheduler(name: str, **options: object) -> Iterator[object]:
    file = (
        "scheduling_"
        + {
            "DDPM": "ddpm",
            "DDIM": "ddim",
            "DDIMInverse": "ddim_inverse",
            "PNDM": "pndm",
            "EulerDiscrete": "euler_discrete",
            "EulerAncestralDiscrete": "euler_ancestral_discrete",
            "DPMSolverMultistep": "dpmsolver_multistep",
        }[name]
    )
    module = importlib.import_module(f"diffusers.schedulers.{file}")
    with patch.object(module, "torch", _Double(torch)), patch.object(module, "np", _Double(np)):
        yield getattr(module, name + "Scheduler")(**options)


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.8 * x.roll(1, 1) - 0.3 * x.roll(1, 2) + t / 500)


def denoiser(form: str) -> Callable[[Tensor, Level], Prediction]:
    return lambda x, level: predict(form, x, network(x, level.t), level.alpha_bar)


def start() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


def theirs(reference: object, n: int, x: Tensor, scale: float = 1.0, **options: object) -> Tensor:
    """diffusers' own loop. scale: what its coordinates multiply the start with."""
    reference.set_timesteps(n)
    x = x * scale
    for t in reference.timesteps:
        output = network(reference.scale_model_input(x, t), t.item())
        x = reference.step(output, t, x, **options).prev_sample
    assert x.dtype == torch.float64
    return x


def agree(ours: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=bound)
    assert expected.abs().max() > 0.1


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def of(zero: bool) -> Schedule:
    return Schedule("scaled_linear", zero_terminal_snr=zero)


@FORMS
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])  # both end at time 0
def test_ddpm(spacing: str, variance: str, form: str) -> None:
    x, n = start(), 20
    ours = last(
        ddpm(
            denoiser(form),
            x,
            of(False).levels(SPACINGS[spacing](1000, n)),
            generator=seeded(),
            variance=variance,
        )
    )
    options = {"prediction_type": form, "variance_type": f"fixed_{variance}", "clip_sample": False}
    with scheduler("DDPM", **SD, **options, timestep_spacing=spacing) as reference:
        agree(ours, theirs(reference, n, x, generator=seeded()))


@pytest.mark.parametrize(
    ("form", "zero", "spacing", "offset"),
    [
        ("epsilon", False, "leading", 1),
        ("v_prediction", False, "leading", 1),
        ("epsilon", False, "trailing", 0),
        ("v_prediction", True, "trailing", 0),
    ],
)
def test_ddpm_that_ends_above_time_zero(spacing: str, offset: int, zero: bool, form: str) -> None:
    """diffusers leaves out the last noise at time 0 only; elsewhere it adds 1e-10 of it, its clamp of a
    variance 0."""
    x, n = start(), 20
    levels = of(zero).levels(leading(1000, n, offset) if spacing == "leading" else trailing(1000, n))
    ours = last(ddpm(denoiser(form), x, levels, generator=seeded()))
    options = {
        "prediction_type": form,
        "clip_sample": False,
        "timestep_spacing": spacing,
        "steps_offset": offset,
    }
    with scheduler("DDPM", **SD, **options, rescale_betas_zero_snr=zero) as reference:
        agree(ours, theirs(reference, n, x, generator=seeded()), bound=1e-9)


def test_ddpm_learned_variance() -> None:
    x, n, plain = start(), 12, network

    def wide(x_t: Tensor, t: float) -> Tensor:
        return torch.cat([plain(x_t, t), torch.tanh(2 * x_t.flip(1))], dim=1)

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        eps, raw = wide(x_t, level.t).chunk(2, dim=1)
        x0 = Prediction.from_eps(x_t, eps, level.alpha_bar).x0
        return Prediction(x0, eps, var_frac=(raw + 1) / 2)

    levels = Schedule("squaredcos_cap_v2").levels(leading(1000, n))
    ours = last(ddpm(denoise, x, levels, generator=seeded(), variance="learned"))
    with (
        patch(f"{__name__}.network", wide),
        scheduler("DDPM", **COSINE, clip_sample=False, variance_type="learned_range") as reference,
    ):
        agree(ours, theirs(reference, n, x, generator=seeded()))


def test_ddpm_clamped() -> None:
    """clip_sample is `Prediction.clamped` in the denoiser."""
    x, n = start(), 12
    plain = denoiser("epsilon")
    levels = Schedule("squaredcos_cap_v2").levels(leading(1000, n))
    ours = last(ddpm(lambda z, level: plain(z, level).clamped(z, level), x, levels, generator=seeded()))
    with scheduler("DDPM", **COSINE, clip_sample=True) as reference:
        agree(ours, theirs(reference, n, x, generator=seeded()))


@FORMS
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim(to_one: bool, offset: int, eta: float, form: str) -> None:
    x, n = start(), 20
    times = leading(1000, n, offset, terminal=-1 if to_one else 0)
    ours = last(ddim(denoiser(form), x, of(False).levels(times), generator=seeded(), eta=eta))
    options = {
        "prediction_type": form,
        "clip_sample": False,
        "set_alpha_to_one": to_one,
        "steps_offset": offset,
    }
    with scheduler("DDIM", **SD, **options) as reference:
        agree(ours, theirs(reference, n, x, generator=seeded(), eta=eta))


@ZERO
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_trailing(eta: float, zero: bool) -> None:
    x, n = start(), 20
    levels = of(zero).levels(trailing(1000, n))
    ours = last(ddim(denoiser("v_prediction"), x, levels, generator=seeded(), eta=eta))
    options = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
    with scheduler("DDIM", **SD, **options, rescale_betas_zero_snr=zero) as reference:
        # with eta = 1 from pure noise no eps remains, of which rounding leaves sqrt(1e-16) = 1e-8
        agree(ours, theirs(reference, n, x, generator=seeded(), eta=eta), 2e-8 if zero and eta else BOUND)


@FORMS
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_inverted(to_one: bool, form: str) -> None:
    """An image's noise: the steps of DDIM from the clean end upwards, the network told the time that is stepped to."""
    x, n = start(), 20
    levels = of(False).levels(leading(1000, n, terminal=-1 if to_one else 0))
    if not to_one:
        levels = levels[:-1] + levels[-2:-1]  # diffusers' first step goes from alpha_bar_0 to itself
    ours = x
    for lower, level in itertools.pairwise(reversed(levels)):
        answer = predict(form, ours, network(ours, level.t), lower.alpha_bar)
        ours = ddim_step(ours, answer, lower, level)
    options = {"prediction_type": form, "clip_sample": False, "set_alpha_to_one": to_one}
    with scheduler("DDIMInverse", **SD, **options) as reference:
        agree(ours, theirs(reference, n, x))


def test_ddim_linspace_by_pairs() -> None:
    """diffusers steps from t to t - 1000 // n whatever the spacing, which under linspace is not the next
    time of its list; its own pairs are followed here step by step."""
    x, n, schedule = start(), 8, of(False)
    ours = x
    for t in linspace(1000, n)[:-1]:
        level, lower = schedule.level(t), schedule.level(max(t - 1000 // n, -1))
        ours = ddim_step(ours, denoiser("epsilon")(ours, level), level, lower)
    with scheduler("DDIM", **SD, clip_sample=False, timestep_spacing="linspace") as reference:
        agree(ours, theirs(reference, n, x))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 20])  # with 3, diffusers misses its own trailing times
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("to_one", [False, True])
def test_plms(to_one: bool, spacing: str, offset: int, n: int) -> None:
    x = start()
    if spacing == "leading":
        times = leading(1000, n, offset, terminal=-1 if to_one else 0)
    else:
        times = trailing(1000, n, terminal=-1 if to_one else 0)
    ours = last(plms(denoiser("epsilon"), x, of(False).levels(times)))
    options = {"skip_prk_steps": True, "set_alpha_to_one": to_one, "steps_offset": offset}
    with scheduler("PNDM", **SD, **options, timestep_spacing=spacing) as reference:
        agree(ours, theirs(reference, n, x))


def test_plms_v() -> None:
    """diffusers averages v over past times and converts the average with the newest alpha_bar; the method
    is about eps, so a v network is held against diffusers with its output converted before."""
    x, n, schedule = start(), 20, of(False)
    ours = last(plms(denoiser("v_prediction"), x, schedule.levels(leading(1000, n, 1, 0))))
    plain = network

    def eps(x_t: Tensor, t: float) -> Tensor:
        return Prediction.from_v(x_t, plain(x_t, t), schedule.level(t).alpha_bar).eps

    with (
        patch(f"{__name__}.network", eps),
        scheduler("PNDM", **SD, skip_prk_steps=True, steps_offset=1) as reference,
    ):
        agree(ours, theirs(reference, n, x))


@FORMS
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("ancestral", [False, True])
def test_euler(ancestral: bool, spacing: str, form: str) -> None:
    """diffusers keeps x / sqrt(alpha_bar); its list of times under linspace is not rounded."""
    x, n = start(), 20
    times = linspace(1000, n, whole=False) if spacing == "linspace" else SPACINGS[spacing](1000, n)
    levels = of(False).levels(times)
    sampler, name = (euler_ancestral, "EulerAncestralDiscrete") if ancestral else (euler, "EulerDiscrete")
    ours = last(sampler(denoiser(form), x, levels, generator=seeded()))
    with scheduler(name, **SD, prediction_type=form, timestep_spacing=spacing) as reference:
        scale = levels[0].alpha_bar ** -0.5
        agree(ours, theirs(reference, n, x, scale, generator=seeded()))


def test_euler_zero_terminal_snr() -> None:
    """diffusers puts alpha_bar_T = 2^-24 for 0: its first x_0 is off by sqrt(alpha_bar_T) = 2.4e-4 of x."""
    x, n = start(), 20
    ours = last(euler(denoiser("v_prediction"), x, of(True).levels(trailing(1000, n))))
    options = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    with scheduler("EulerDiscrete", **SD, **options) as reference:
        agree(ours, theirs(reference, n, x, 2.0**12), bound=2e-3)


@FORMS
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "n", [5, 20]
)  # below 15 steps diffusers has another rule for the last; it changes nothing
def test_dpmpp_2m(n: int, spacing: str, form: str) -> None:
    """diffusers takes n of n + 1 times here, without the cleanest, except under trailing."""
    x = start()
    times = trailing(1000, n) if spacing == "trailing" else [*SPACINGS[spacing](1000, n + 1)[:-2], -1]
    ours = last(dpmpp_2m(denoiser(form), x, of(False).levels(times)))
    with scheduler("DPMSolverMultistep", **SD, prediction_type=form, timestep_spacing=spacing) as reference:
        agree(ours, theirs(reference, n, x))


@FORMS
@pytest.mark.parametrize("n", [1, 5, 20])
def test_dpmpp_2m_karras(n: int, form: str) -> None:
    x = start()
    ours = last(dpmpp_2m(denoiser(form), x, karras(of(False), n)))
    with scheduler("DPMSolverMultistep", **SD, prediction_type=form, use_karras_sigmas=True) as reference:
        agree(ours, theirs(reference, n, x))


def test_dpmpp_2m_zero_terminal_snr() -> None:
    """diffusers puts alpha_bar_T = 2^-24 for 0, off by 2.4e-4 of x; the infinite step is taken here as
    it is."""
    x, n = start(), 20
    ours = last(dpmpp_2m(denoiser("v_prediction"), x, of(True).levels(trailing(1000, n))))
    options = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    with scheduler("DPMSolverMultistep", **SD, **options) as reference:
        agree(ours, theirs(reference, n, x), bound=2e-3)


@pytest.mark.parametrize(
    ("name", "options"), [("linear", {}), ("scaled_linear", SD), ("squaredcos_cap_v2", COSINE)]
)
@ZERO
def test_tables(name: str, options: dict, zero: bool) -> None:
    with scheduler("DDIM", **{"beta_schedule": name} | options, rescale_betas_zero_snr=zero) as reference:
        ours = Schedule(name, zero_terminal_snr=zero)
        # float64 products of up to 1000 factors; with zero terminal SNR, differences of numbers near 1
        torch.testing.assert_close(ours.alphas_bar, reference.alphas_cumprod, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(ours.betas, reference.betas, rtol=1e-9, atol=1e-15)
