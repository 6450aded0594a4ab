"""Data whose denoiser is known exactly: x_0 ~ N(MEAN, deviation²) in every pixel."""

from torch import Tensor

from diffusion import Denoiser, Level, Prediction

MEAN = 0.7


def denoiser(deviation: float) -> Denoiser:
    """E[x_0 | x_t] for this data: linear in x_t."""

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        a, s2 = level.alpha_bar, deviation**2
        x0 = MEAN + s2 * a**0.5 / (s2 * a + 1 - a) * (x_t - a**0.5 * MEAN)
        return Prediction.from_x0(x_t, x0, a)

    return denoise


def transport(x_t: Tensor, deviation: float, level: Level, lower: Level) -> Tensor:
    """The exact solution of the probability-flow equation: each marginal's quantiles move to the next's."""
    scales = [(deviation**2 * lv.alpha_bar + 1 - lv.alpha_bar) ** 0.5 for lv in (level, lower)]
    return lower.alpha_bar**0.5 * MEAN + scales[1] / scales[0] * (x_t - level.alpha_bar**0.5 * MEAN)
