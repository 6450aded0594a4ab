"""What a network says about a noisy batch, in the form that every sampler takes.

Three parametrisations name the same thing (Salimans & Ho 2022), with a = alpha_bar:

    x_t = sqrt(a) x_0 + sqrt(1 - a) eps,        v = sqrt(a) eps - sqrt(1 - a) x_0,

so each of eps, x_0 and v gives the other two. A `Prediction` carries both x_0 and eps, because neither alone
survives the ends: at a = 0 (zero terminal SNR) x_0 cannot be had from eps, and near a = 1 eps drowns in x_0.

A classifier's gradient travels with the prediction and is applied by the step, since there are two rules:
ancestral steps shift the mean by Sigma · guide (Dhariwal & Nichol 2021, algorithm 1), deterministic ones
correct the score, eps - sqrt(1 - a) · guide (algorithm 2): `guided`.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from diffusion.errors import DiffusionError
from diffusion.schedule import Level, coefficient


@dataclass(frozen=True)
class Prediction:
    """A prediction at one noise level.

    x0, eps: (B, C, H, W), consistent with x_t. var_frac: (B, C, H, W) or None, where the variance lies
    between the posterior's (0) and beta (1) on a log scale; a network's raw output u in [-1, 1] is (u + 1)
    / 2. guide: (B, C, H, W) or None, s · ∇ log p(y | x_t), taken at x_t. clipped: x_0 was brought into [-1, 1], and
    is by `with_eps` again.
    """

    x0: Tensor
    eps: Tensor
    var_frac: Tensor | None = None
    guide: Tensor | None = None
    clipped: bool = False

    @classmethod
    def from_eps(cls, x_t: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> "Prediction":
        """x_t, eps: (B, …). alpha_bar: a float, or (B,) float64.

        Raises DiffusionError where it is 0, and unless there are as many as samples.
        """
        if (alpha_bar == 0).any() if isinstance(alpha_bar, Tensor) else alpha_bar == 0:
            raise DiffusionError(
                "predicted noise says nothing about pure noise (alpha_bar = 0): zero terminal SNR needs a "
                "network that predicts v or x0"
            )
        noise = coefficient((1 - alpha_bar) ** 0.5, x_t) * eps
        return cls((x_t - noise) / coefficient(alpha_bar**0.5, x_t), eps)

    @classmethod
    def from_x0(cls, x_t: Tensor, x0: Tensor, alpha_bar: float | Tensor) -> "Prediction":
        """x_t, x0: (B, …). alpha_bar: a float, or (B,) float64.

        Raises DiffusionError where it is 1, and unless there are as many as samples.
        """
        if (alpha_bar == 1).any() if isinstance(alpha_bar, Tensor) else alpha_bar == 1:
            raise DiffusionError(
                "x_0 says nothing about the noise where there is none (alpha_bar = 1): begin at a time of some noise, "
                "or with a network that predicts noise or v"
            )
        signal = coefficient(alpha_bar**0.5, x_t) * x0
        return cls(x0, (x_t - signal) / coefficient((1 - alpha_bar) ** 0.5, x_t))

    @classmethod
    def from_v(cls, x_t: Tensor, v: Tensor, alpha_bar: float | Tensor) -> "Prediction":
        """x_t, v: (B, …). alpha_bar: a float, or (B,) float64, from 0 to 1: exact at both ends.

        Raises DiffusionError unless there are as many as samples.
        """
        signal, noise = coefficient(alpha_bar**0.5, x_t), coefficient((1 - alpha_bar) ** 0.5, x_t)
        return cls(signal * x_t - noise * v, signal * v + noise * x_t)

    def with_x0(self, x_t: Tensor, x0: Tensor, level: Level) -> "Prediction":
        """Another x_0 and the eps that goes with it; where x_t is clean, of which x_0 says no eps, eps stays as it is.

        x_t, x0: (B, C, H, W). A variance and a guide are kept.
        """
        eps = self.eps if level.alpha_bar == 1 else Prediction.from_x0(x_t, x0, level.alpha_bar).eps
        return replace(self, x0=x0, eps=eps)

    def with_eps(self, x_t: Tensor, eps: Tensor, level: Level) -> "Prediction":
        """Another eps, as a sampler makes it of several, and the x_0 that goes with it; what was clipped is clipped
        anew: where alpha_bar is small, a little of eps is much of x_0.

        x_t, eps: (B, C, H, W). A variance and a guide are kept. Raises DiffusionError at alpha_bar = 0.
        """
        found = replace(self, x0=Prediction.from_eps(x_t, eps, level.alpha_bar).x0, eps=eps)
        return found.clamped(x_t, level) if self.clipped else found

    def clamped(self, x_t: Tensor, level: Level) -> "Prediction":
        """x_0 clipped to [-1, 1] (pixels, not latents), see `with_x0`. x_t: (B, C, H, W)."""
        return replace(self.with_x0(x_t, self.x0.clamp(-1, 1), level), clipped=True)

    def guided(self, x_t: Tensor, level: Level) -> "Prediction":
        """The guide folded into the score (Dhariwal & Nichol 2021, algorithm 2); unchanged without one.

        x_t: (B, C, H, W). Raises DiffusionError for a guide at alpha_bar = 0.
        """
        if self.guide is None:
            return self
        if level.alpha_bar == 0:
            raise DiffusionError(
                "a gradient added to the score of pure noise (alpha_bar = 0, zero terminal SNR) would move x_0 without "
                "end: begin where there is less noise, or take ancestral steps (ddpm), which shift their mean instead"
            )
        eps = self.eps - (1 - level.alpha_bar) ** 0.5 * self.guide
        x0 = Prediction.from_eps(x_t, eps, level.alpha_bar).x0                       # which is clipped nowhere any more
        return replace(self, x0=x0, eps=eps, guide=None, clipped=False)


class Denoiser(Protocol):
    """Anything that predicts at a noise level; a prompt, a class or a guidance is bound beforehand."""

    def __call__(self, x_t: Tensor, level: Level) -> Prediction:
        """x_t: (B, C, H, W) with variance preserved, sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
        ...


FORMS = {"epsilon": Prediction.from_eps, "v_prediction": Prediction.from_v, "sample": Prediction.from_x0}


def require_form(form: str) -> None:
    """Raise DiffusionError unless networks predict in this form, one of `epsilon`, `v_prediction` and `sample`."""
    if form not in FORMS:
        raise DiffusionError(f"no network predicts {form!r} here; there are {', '.join(FORMS)}")


def predict(form: str, x_t: Tensor, output: Tensor, alpha_bar: float | Tensor) -> Prediction:
    """A network's raw output as a Prediction.

    form: `epsilon`, `v_prediction` or `sample`, as diffusers' configurations call them. x_t: (B, C, …). output:
    (B, C, …), or (B, 2C, …) of a network that learned its variance, whose second half u lies in [-1, 1].
    Raises DiffusionError for another form, and an output of another shape.
    """
    require_form(form)
    channels = x_t.shape[1]
    if output.shape not in (x_t.shape, (len(x_t), 2 * channels, *x_t.shape[2:])):
        raise DiffusionError(f"a network answers x_t {tuple(x_t.shape)} alike, or with twice as many channels where it "
                             f"learned its variance, not with {tuple(output.shape)}")  # fmt: skip
    prediction = FORMS[form](x_t, output[:, :channels], alpha_bar)
    if output.shape[1] == channels:
        return prediction
    return replace(prediction, var_frac=(output[:, channels:] + 1) / 2)
