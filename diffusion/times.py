"""Lists of times: which noise levels a sampler visits, as data.

A list runs from the noisiest time down and includes its terminal entry: -1 for clean (alpha_bar = 1), or 0 to stop at
alpha_bar_0, as Stable Diffusion's DDIM does (diffusers: `set_alpha_to_one=False`). Steps are its neighbouring pairs, so
a list of n + 1 entries is n steps, and starting later or stopping earlier is slicing.

`leading`, `linspace` and `trailing` are the spacings of diffusers, named after Lin et al. 2023, table 2; `respaced` is
that of guided-diffusion and GLIDE (openai/glide-text2im at 69b5307); `karras` places sigmas (Karras et al. 2022,
equation 5). `default_levels` is what a Stable Diffusion pipeline of diffusers takes with each sampler.
"""

import bisect
import math
from numbers import Integral, Real

from diffusion.errors import DiffusionError
from diffusion.samplers import require_sampler
from diffusion.schedule import LAST, Level, Schedule


def leading(steps: int, n: int, offset: int = 0, terminal: int = -1) -> list[float]:
    """Every (steps // n)-th time, counted from 0 and moved up by `offset`: the noisiest times are left out.

    steps: T of the schedule. n: steps to take. Returns n + 1 floats, descending, `terminal` last.
    Raises DiffusionError if n steps do not fit or the offset passes T - 1.
    """
    _check(steps, n)
    times = [i * (steps // n) + offset for i in reversed(range(n))]
    if times[0] > steps - 1:
        raise DiffusionError(f"{n} leading steps with offset {offset} begin at time {times[0]}, past {steps - 1}")
    return [float(t) for t in (*times, terminal)]


def linspace(steps: int, n: int, terminal: int = -1, whole: bool = True) -> list[float]:
    """n times evenly from T - 1 to 0, both included; `whole` rounds them (half to even).

    One step starts at T - 1, where the noise is (diffusers starts it at 0). Returns n + 1 floats, descending.
    Raises DiffusionError if n steps do not fit.
    """
    _check(steps, n)
    stride = (steps - 1) / max(n - 1, 1)
    times = [steps - 1, *(i * stride for i in range(n - 2, -1, -1))]
    return [float(round(t) if whole else t) for t in (*times, terminal)]


def trailing(steps: int, n: int, terminal: int = -1) -> list[float]:
    """n times from T - 1 down in strides of T / n, rounded: these always start at the last time.

    Returns n + 1 floats, descending. Raises DiffusionError if n steps do not fit.
    """
    _check(steps, n)
    # as numpy's arange has it: written otherwise, halves round otherwise
    stride = steps - (steps - steps / n)
    return [float(t) for t in (*(round(steps - i * stride) - 1 for i in range(n)), terminal)]


def respaced(spec: str, steps: int = 1000) -> list[float]:
    """The spacings of guided-diffusion and GLIDE, terminal entry -1 added.

    spec: "100" (that many, evenly, both ends included; "1" starts at T - 1, where the noise is, theirs at 0);
    "10,10,3,2,2" (the times cut into as many sections, so many from each, the cleanest section first);
    "ddim50" (an integer stride that gives exactly so many); "fast27" (GLIDE's: "10,10,3,2,2" with its noisiest
    time moved from T - 1 to T - 3). Returns descending floats. Raises DiffusionError for a spec that is none of
    these or does not fit.
    """
    if not isinstance(spec, str):
        raise DiffusionError(f"a spacing is a text, '100' for as many steps, not {spec!r}")
    if spec == "fast27":
        return [float(steps - 3), *respaced("10,10,3,2,2", steps)[1:]]
    if spec.startswith("ddim") and spec[4:].isdecimal():
        wanted = int(spec[4:])
        stride = next((s for s in range(1, steps) if len(range(0, steps, s)) == wanted), None)
        if stride is None:
            raise DiffusionError(f"{spec!r}: no whole stride through {steps} times gives exactly {wanted} of them")
        return [float(t) for t in (*reversed(range(0, steps, stride)), -1)]
    counts = spec.split(",")
    if not all(count.strip().isdecimal() for count in counts):
        raise DiffusionError(f"{spec!r} is no spacing: write '100', '10,10,3,2,2', 'ddim50' or 'fast27'")
    if [int(count) for count in counts] == [1]:
        return [float(steps - 1), -1.0]
    return [float(t) for t in (*reversed(_sections([int(c) for c in counts], steps)), -1)]


def from_strength(times: list[float], strength: float) -> list[float]:
    """The last int(n · strength) steps of a list, where image-to-image starts (as diffusers counts them).

    times: n + 1 entries. strength: above 0, at most 1 (all of them). Raises DiffusionError for any other, or if
    no step is left. Also takes a list of levels.
    """
    n = len(times) - 1
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise DiffusionError(f"a strength is a number above 0 and at most 1, not {strength!r}")
    kept = min(int(n * strength), n)
    if kept == 0:
        enough = math.ceil(1 / strength)
        enough += int(enough * strength) == 0                       # where the product rounds to just below 1
        raise DiffusionError(f"strength {strength:g} leaves none of {n} steps: take at least {enough}")
    return times[-kept - 1 :]


def karras(schedule: Schedule, n: int, rho: float = 7.0) -> list[Level]:
    """n levels between the schedule's ends, evenly in sigma^(1 / rho), and the clean one (Karras et al.
    2022, eq. 5).

    A network is told the nearest whole time, as it was trained on those. Returns n + 1 levels, descending.
    Raises DiffusionError with zero terminal SNR, whose largest sigma is infinite, for a table that begins clean, and if
    n steps do not fit.
    """
    _check(schedule.steps, n)
    table = [schedule.level(t).sigma for t in range(schedule.steps)]
    if math.isinf(table[-1]):
        raise DiffusionError("Karras times need a finite largest sigma: with zero terminal SNR take trailing times")
    if table[0] == 0:
        raise DiffusionError("Karras times need a smallest sigma above 0, and this schedule begins with alpha_bar = 1")
    low, high = table[0] ** (1 / rho), table[-1] ** (1 / rho)
    sigmas = [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]
    return [*(Level(float(round(_time_of(s, table))), 1 / (1 + s**2)) for s in sigmas), LAST]


def default_levels(schedule: Schedule, sampler: str, n: int) -> list[Level]:
    """The levels that diffusers' Stable Diffusion pipelines visit with a sampler of `diffusion.SAMPLERS`.

    DDPM: leading, offset 1. DDIM and PLMS: leading, offset 1, ending at alpha_bar_0. Both Eulers: linspace,
    not rounded. DPM-Solver++: linspace without its 0, or Karras. With zero terminal SNR all take trailing
    times, because only those start where the noise is pure (Lin et al. 2023, section 3.3), and end clean
    (diffusers' DDIM, set as Stable Diffusion's, ends at alpha_bar_0 even then). Returns n + 1 levels, descending.
    Raises DiffusionError for an unknown sampler, or if n steps do not fit.
    """
    require_sampler(sampler)
    if not isinstance(n, Integral):
        raise DiffusionError(f"a sampler takes a whole number of steps, not {n!r}")
    steps = schedule.steps
    if schedule.alphas_bar[-1] == 0:
        return schedule.levels(trailing(steps, n))
    if sampler == "dpmpp_2m_karras":
        return karras(schedule, n)
    if sampler == "dpmpp_2m":
        if not 1 <= n < steps:
            raise DiffusionError(f"{n} steps do not fit dpmpp_2m: of {steps} times it takes between 1 and {steps - 1}")
        times = linspace(steps, n + 1)
        return schedule.levels([*times[:-2], times[-1]])
    if sampler in ("euler", "euler_ancestral"):
        return schedule.levels(linspace(steps, n, whole=False))
    offset = 1 if n < steps else 0  # an offset would push the first of T steps past the table
    return schedule.levels(leading(steps, n, offset, terminal=-1 if sampler == "ddpm" else 0))


def _check(steps: int, n: int) -> None:
    if not isinstance(n, Integral) or not 1 <= n <= steps:
        raise DiffusionError(f"{n} steps do not fit a schedule of {steps}: take between 1 and {steps}, a whole number")


def _sections(counts: list[int], steps: int) -> list[int]:
    """`counts[i]` times from the i-th of len(counts) sections of nearly equal size, ascending."""
    times: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 0 < count <= size:
            raise DiffusionError(f"a section of {size} times cannot give {count} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # added up as the original does: i * stride would round other ways
            times.append(start + round(position))
            position += stride
        start += size
    return times


def _time_of(sigma: float, table: list[float]) -> float:
    """The time at which a sigma holds, interpolated in log sigma; table: ascending sigmas."""
    if len(table) == 1:
        return 0.0
    above = min(max(bisect.bisect_right(table, sigma), 1), len(table) - 1)
    low, high = math.log(table[above - 1]), math.log(table[above])
    if low == high:                                 # the last two times of a table of one's own are alike
        return float(above)
    return above - 1 + min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)
