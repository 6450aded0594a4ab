"""Samplers: the steps of `diffusion.steps`, chained over a list of levels.

A sampler is a generator function over a list of levels (see `diffusion.times`): it yields a `State` after
each step, so that progress bars, previews and stopping belong to the caller. x preserves the variance,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,

and a chain starts from N(0, I), or from q(x_t | x_0) of an image. In these coordinates Euler's method on

    d(x / sqrt(alpha_bar)) / d(sigma) = eps                         (Karras et al. 2022, equation 1)

is DDIM with eta = 0 (Song et al. 2021, equation 13), and Euler ancestral is DDIM with eta = 1. The same
formulas, which stay finite at infinite sigma; the names differ in the times that they usually visit.

Randomness: `generator` is a CPU torch.Generator, or one for each sample of the batch, or None for torch's own. Noise is
drawn on the CPU in float32 (float64 if the chain begins in it) and moved, so that a seed means the same on every
device, and whatever the network answers in.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, Prediction
from diffusion.errors import DiffusionError
from diffusion.posterior import posterior_variance
from diffusion.schedule import Level
from diffusion.steps import TINY, ddim_step, ddpm_step, dpmpp_2m_step

Generators = torch.Generator | Sequence[torch.Generator] | None


class State(NamedTuple):
    """After step `index` of `total`: `x` (B, C, H, W) at `level`, and the prediction that led there."""

    index: int
    total: int
    level: Level
    x: Tensor
    prediction: Prediction


def draw(shape: Sequence[int], generator: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, I) on the CPU. shape: (B, …). generator: one for all, one for each of B, or torch's own.

    Raises DiffusionError if there are generators, but not B of them.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device="cpu")
    if len(generator) != shape[0]:
        raise DiffusionError(f"{len(generator)} generators were given for a batch of {shape[0]}")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, dtype=dtype, device="cpu") for g in generator])


def ddpm(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None, variance: str | None = None
) -> Iterator[State]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over any levels (Nichol & Dhariwal 2021, eq. 19).

    x: (B, C, H, W) at levels[0]. variance: `small`, `large` or `learned`; None is learned where the network predicts
    one, else small. The last learned one is clipped from below at the variance of the step before, as in
    openai/guided-diffusion at 22e0df8. Raises DiffusionError for levels that do not go from noise to clean, as every
    sampler, and as `ddpm_step` and `draw` do.
    """
    _check(levels)
    wide = x.dtype == torch.float64
    below = posterior_variance(levels[-3].alpha_bar, levels[-2].alpha_bar) if len(levels) > 2 else TINY
    for index, (level, lower) in enumerate(zip(levels, levels[1:])):
        prediction = denoise(x, level)
        noise = _noise(x, generator, wide)
        chosen = variance or ("small" if prediction.var_frac is None else "learned")
        floor = below if lower.alpha_bar == 1 else TINY
        x = ddpm_step(x, prediction, level, lower, noise, chosen, floor)
        yield State(index, len(levels) - 1, lower, x, prediction)


def ddim(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None, eta: float = 0.0
) -> Iterator[State]:
    """DDIM (Song et al. 2021, equation 12). x: (B, C, H, W) at levels[0]. eta: 0 to 1; 0 draws no noise.

    Raises DiffusionError for levels that do not go from noise to clean, for another eta, and as `draw` does.
    """
    _check(levels)
    if not 0 <= eta <= 1:
        raise DiffusionError(f"eta lies between 0 (deterministic) and 1 (ancestral), not at {eta:g}")
    wide = x.dtype == torch.float64
    for index, (level, lower) in enumerate(zip(levels, levels[1:])):
        prediction = denoise(x, level)
        noise = _noise(x, generator, wide) if eta > 0 else None
        x = ddim_step(x, prediction, level, lower, eta, noise)
        yield State(index, len(levels) - 1, lower, x, prediction)


def euler(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None) -> Iterator[State]:
    """Euler's method in sigma (Karras et al. 2022, algorithm 1 without its second half). Draws no noise.

    (diffusers 0.42, scheduling_euler_discrete.py, begins with the noise alone, sqrt(1 - alpha_bar) N(0, I), unless its
    times are leading.)
    x: (B, C, H, W) at levels[0]. Raises DiffusionError for levels that do not go from noise to clean.
    """
    return ddim(denoise, x, levels, eta=0.0)


def euler_ancestral(
    denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None
) -> Iterator[State]:
    """Euler to sigma_down, then noise back up to the next sigma.

    Source: crowsonkb/k-diffusion at 686dbad, sampling.py, sample_euler_ancestral.
    sigma_up² = sigma_s² (sigma_t² - sigma_s²) / sigma_t² is, divided by 1 + sigma_s², DDIM's variance at
    eta = 1. x: (B, C, H, W) at levels[0]. Raises DiffusionError as `ddim`.
    """
    return ddim(denoise, x, levels, generator=generator, eta=1.0)


def plms(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None) -> Iterator[State]:
    """Pseudo linear multistep (Liu et al. 2022, equations 9 and 12), started as in CompVis/latent-diffusion at f0c4e09.

    The eps of up to four levels are combined (Adams-Bashforth) and carried by DDIM's deterministic step; where x_0 was
    clipped, that of the combined eps is, too (`Prediction.with_eps`).
    The first step has no past and averages eps at both of its ends (Heun), so that n steps ask the network n + 1
    times. Not where it is the last step as well: the network was never asked about a clean image. A step from pure
    noise (alpha_bar = 0), where eps says nothing, is a plain one, and the next is the first. Draws no noise. (diffusers
    combines what the network answers instead, which is something else where that is v.)
    x: (B, C, H, W) at levels[0]. Raises DiffusionError for levels that do not go from noise to clean.
    """
    _check(levels)
    past: list[Tensor] = []
    for index, (level, lower) in enumerate(zip(levels, levels[1:])):
        prediction = denoise(x, level).guided(x, level)
        if level.alpha_bar > 0:
            past = [*past[-3:], prediction.eps]
            eps = _adams_bashforth(past)
            if len(past) == 1 and index < len(levels) - 2:
                x_end = ddim_step(x, prediction, level, lower)
                eps = (eps + denoise(x_end, lower).guided(x_end, lower).eps) / 2
            prediction = prediction.with_eps(x, eps, level)
        x = ddim_step(x, prediction, level, lower)
        yield State(index, len(levels) - 1, lower, x, prediction)


def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], *, generator: Generators = None) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). x: (B, C, H, W) at levels[0]. Draws no noise.

    Raises DiffusionError for levels that do not go from noise to clean.
    """
    _check(levels)
    before: tuple[Tensor, Level] | None = None
    for index, (level, lower) in enumerate(zip(levels, levels[1:])):
        prediction = denoise(x, level).guided(x, level)
        x = dpmpp_2m_step(x, prediction, level, lower, before)
        before = (prediction.x0, level)
        yield State(index, len(levels) - 1, lower, x, prediction)


SAMPLERS: dict[str, Callable[..., Iterator[State]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_karras": dpmpp_2m,  # the same function; `times.default_levels` gives it Karras's sigmas
}


def last(states: Iterator[State]) -> Tensor:
    """Runs a sampler to its end and returns the last x, (B, C, H, W). Raises DiffusionError if it takes no step."""
    x: Tensor | None = None
    for state in states:
        x = state.x
    if x is None:
        raise DiffusionError("the sampler took no step: its list of levels is empty")
    return x


def require_sampler(name: str) -> None:
    """Raise DiffusionError unless a sampler of `SAMPLERS` has this name."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise DiffusionError(f"no sampler is called {name!r}; there are {', '.join(SAMPLERS)}")


def _noise(x: Tensor, generator: Generators, wide: bool) -> Tensor:
    return draw(x.shape, generator, torch.float64 if wide else torch.float32).to(x.dtype).to(x.device)


def _adams_bashforth(past: Sequence[Tensor]) -> Tensor:
    """The derivative over the next step from those at up to four levels, the latest last."""
    weights = {
        1: (1,),
        2: (-1 / 2, 3 / 2),
        3: (5 / 12, -16 / 12, 23 / 12),
        4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
    }
    return sum(weight * eps for weight, eps in zip(weights[len(past)], past))


def _check(levels: Sequence[Level]) -> None:
    if not isinstance(levels, Sequence) or not all(isinstance(level, Level) for level in levels):
        raise DiffusionError("a sampler goes over a list of levels, not of times: make it by Schedule.levels(times)")
    if len(levels) < 2:
        raise DiffusionError(f"sampling needs at least two levels, a start and an end, not {len(levels)}")
    for i, (level, lower) in enumerate(zip(levels, levels[1:])):
        at_end = i == len(levels) - 2  # the terminal entry may repeat time 0
        if lower.alpha_bar < level.alpha_bar or (lower.alpha_bar == level.alpha_bar and not at_end):
            raise DiffusionError(
                f"levels go from noise to clean, but entry {i + 1} (time {lower.t:g}) is not cleaner than "
                f"the one before it (time {level.t:g})"
            )
