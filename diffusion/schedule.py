"""Noise schedules and the forward process.

A schedule is a table of T variances beta_t in (0, 1], t = 0 … T - 1, and its running product

    alpha_bar_t = prod_{i <= t} (1 - beta_i),
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

Three formulas are published under three names:

- `linear`              beta from 1e-4 to 0.02 (Ho et al. 2020, section 4), both times 1000 / T for other T
                        (openai/guided-diffusion at 22e0df8, gaussian_diffusion.py);
- `scaled_linear`       sqrt(beta) linear, from 0.00085 to 0.012 in Stable Diffusion (CompVis/stable-diffusion at
                        21f890f, v1-inference.yaml);
- `squaredcos_cap_v2`   alpha_bar(u) = cos²(π/2 · (u + 0.008) / 1.008), beta at most 0.999 (Nichol & Dhariwal
                        2021, equation 17). Some repositories call it `cosine`.

`zero_terminal_snr` shifts and scales sqrt(alpha_bar) so that its last entry is exactly 0 and its first is kept (Lin et
al. 2023, algorithm 1): the last step is then pure noise, and alpha_bar = 0 has to be exact everywhere.

Tables are float64 on the CPU and never follow a model's dtype. A coefficient is gathered and finished in
float64, and only then cast to the dtype of the tensor that it multiplies.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import DiffusionError

TABLE = {"dtype": torch.float64, "device": "cpu"}    # whatever torch's defaults are
NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class Level(NamedTuple):
    """A noise level: the time `t` that a network is told (-1 when clean) and its `alpha_bar`."""

    t: float
    alpha_bar: float

    @property
    def sigma(self) -> float:
        """Noise over signal, sqrt((1 - alpha_bar) / alpha_bar): 0 when clean, infinite for pure noise."""
        return math.sqrt((1 - self.alpha_bar) / self.alpha_bar) if self.alpha_bar > 0 else math.inf


LAST = Level(-1.0, 1.0)


class Schedule:
    """A table of betas made from a named formula, and the forward process over it.

    name: one of `NAMES`. steps: T >= 1. beta_start, beta_end: for the two linear formulas only, 0 < beta < 1;
    None takes the published values. zero_terminal_snr: see the module.
    alphas_bar, betas: (T,) float64 on the CPU. Another table of T numbers from 0 to 1, none above the one before, may
    take the place of alphas_bar, of which all else is made: a schedule of one's own. Raises DiffusionError for other
    arguments, and for other tables.
    """

    def __init__(
        self,
        name: str,
        steps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
            raise DiffusionError(f"a schedule needs a whole number of steps, at least 1, not {steps!r}")
        self.name, self.steps, self.zero_terminal_snr = name, int(steps), zero_terminal_snr
        self._alphas_bar = torch.cumprod(1 - _betas(name, self.steps, beta_start, beta_end), dim=0)
        if zero_terminal_snr:
            self._alphas_bar = _zero_terminal(self._alphas_bar)

    @property
    def alphas_bar(self) -> Tensor:
        """(T,) float64 on the CPU."""
        return self._alphas_bar

    @alphas_bar.setter
    def alphas_bar(self, table: Tensor | Sequence[float]) -> None:
        table = torch.as_tensor(table, dtype=torch.float64, device="cpu")
        if table.shape != (self.steps,):
            raise DiffusionError(f"a table of this schedule holds ({self.steps},) numbers, not {tuple(table.shape)}")
        if not ((table >= 0) & (table <= 1)).all() or (table.diff() > 0).any():
            raise DiffusionError("alphas_bar are numbers from 1 to 0, none above the one before: these are not")
        self._alphas_bar = table

    @property
    def betas(self) -> Tensor:
        """(T,) float64 on the CPU: 1 - alpha_bar_t / alpha_bar_{t-1}; 1 where there was nothing but noise before."""
        before = torch.cat([self.alphas_bar.new_ones(1), self.alphas_bar[:-1]])
        return torch.where(before > 0, 1 - self.alphas_bar / before, 1.0)

    def __repr__(self) -> str:
        zero = ", zero_terminal_snr=True" if self.zero_terminal_snr else ""
        betas = self.betas
        first, last = betas[0].item(), betas[-1].item()
        return f"Schedule({self.name!r}, steps={self.steps}{zero}: betas {first:.6g} to {last:.6g})"

    def alpha_bar(self, t: Tensor) -> Tensor:
        """alpha_bar at whole times.

        t: (B,) int64 in -1 … T - 1, on any device; -1 gives exactly 1. Returns (B,) float64 on the CPU.
        Raises DiffusionError for times that are no tensor, are not whole, or lie outside.
        """
        if not isinstance(t, Tensor):
            raise DiffusionError(f"times are a tensor (B,), one a sample, not {t!r}: a single one has its `level`")
        if t.is_floating_point():
            raise DiffusionError(f"the tables are read at whole times (int64), not at {t.dtype} ones")
        t = t.cpu().long()
        if t.numel() and not (int(t.min()) >= -1 and int(t.max()) < self.steps):
            raise DiffusionError(f"times {t.tolist()} must lie between -1 and {self.steps - 1}")
        return torch.where(t < 0, 1.0, self.alphas_bar[t])

    def snr(self, t: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar). t: (B,) int64. Returns (B,) float64 on the CPU, infinite at t = -1.

        Raises DiffusionError as `alpha_bar`.
        """
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw from q(x_t | x_0), Ho et al. 2020, equation 4.

        x0, noise: (B, …) of one floating dtype. t: (B,) int64. Returns x_t, (B, …), x0's dtype and device.
        Raises DiffusionError as `alpha_bar`, for whole numbers, for noise of another shape or dtype, and unless there
        are as many times as samples.
        """
        signal, rest = self._coefficients(x0, t, noise)
        return signal * x0 + rest * noise

    def velocity(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4).

        x0, noise: (B, …). t: (B,) int64. Returns (B, …), x0's dtype and device. Raises DiffusionError as `q_sample`.
        """
        signal, rest = self._coefficients(x0, t, noise)
        return signal * noise - rest * x0

    def _coefficients(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), (B, 1, …) each, in x0's dtype."""
        alpha_bar = self.alpha_bar(t)
        found = coefficient(alpha_bar**0.5, x0), coefficient((1 - alpha_bar) ** 0.5, x0)
        if (noise.shape, noise.dtype) != (x0.shape, x0.dtype):          # one for several would be broadcast in silence
            kinds = [f"{x.dtype} {tuple(x.shape)}" for x in (x0, noise)]
            raise DiffusionError(f"noise is like x_0, {kinds[0]}, a number of its own for each; this is {kinds[1]}")
        return found

    def level(self, t: float) -> Level:
        """The noise level at one time; between whole times sigma is interpolated linearly, as diffusers' Euler does.

        t: -1 (clean) or 0 … T - 1, whole or not. Raises DiffusionError outside, and strictly before a last
        step of infinite sigma.
        """
        if t == -1:
            return LAST
        if not 0 <= t <= self.steps - 1:
            raise DiffusionError(f"time {t} must be -1 or lie between 0 and {self.steps - 1}")
        below = math.floor(t)
        if below == t:
            return Level(float(t), self.alphas_bar[below].item())
        low, high = (Level(i, self.alphas_bar[i].item()).sigma for i in (below, below + 1))
        if math.isinf(high):
            raise DiffusionError(f"time {t} lies beside a step of infinite sigma: take a whole time there")
        sigma = low + (t - below) * (high - low)
        return Level(float(t), 1 / (1 + sigma**2))

    def levels(self, times: Iterable[float]) -> list[Level]:
        """`level` of each time of a list from `diffusion.times`, terminal entry included; raises as it does."""
        return [self.level(t) for t in times]


def coefficient(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A finished coefficient, ready to multiply `like` (B, …).

    value: a float, returned as it is, or (B,) float64, cast and returned as (B, 1, …). Raises DiffusionError for
    another number of them than B, and where `like` holds whole numbers, among which the coefficient would be 0.
    """
    if not isinstance(value, Tensor):
        return value
    if not (like.is_floating_point() or like.is_complex()):
        raise DiffusionError(f"a batch of {like.dtype} has no noise levels: give floats, as images in [-1, 1]")
    if value.ndim and value.shape != like.shape[:1]:
        found = f"{len(value)} times" if value.ndim == 1 else f"times {tuple(value.shape)}"
        raise DiffusionError(f"{found} were given for a batch of {len(like)}: give ({len(like)},)")
    return value.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _betas(name: str, steps: int, start: float | None, end: float | None) -> Tensor:
    if name not in NAMES:
        raise DiffusionError(f"no schedule is called {name!r}; there are {', '.join(NAMES)}")
    if name == "squaredcos_cap_v2":
        if start is not None or end is not None:
            raise DiffusionError("squaredcos_cap_v2 takes no beta_start or beta_end: its formula says it all")
        u = torch.arange(steps + 1, **TABLE) / steps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    scale = 1000 / steps if name == "linear" else 1.0
    default_start, default_end = (1e-4 * scale, 0.02 * scale) if name == "linear" else (0.00085, 0.012)
    start = default_start if start is None else start
    end = default_end if end is None else end
    if not (isinstance(start, Real) and isinstance(end, Real)):
        raise DiffusionError(f"betas are numbers, not {start!r} and {end!r}")
    if not (0 < start < 1 and 0 < end < 1):
        raise DiffusionError(f"betas lie between 0 and 1, but {name} over {steps} steps runs from {start:g} to {end:g}")
    if name == "linear":
        return torch.linspace(start, end, steps, **TABLE)
    return torch.linspace(start**0.5, end**0.5, steps, **TABLE) ** 2


def _zero_terminal(alphas_bar: Tensor) -> Tensor:
    if len(alphas_bar) < 2:
        raise DiffusionError("zero terminal SNR needs a schedule of at least 2 steps")
    root = alphas_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2  # Lin et al. 2023, algorithm 1
