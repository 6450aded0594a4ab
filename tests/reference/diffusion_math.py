"""The reference case `diffusion_math`: everything that openai/guided-diffusion answered, computed again by
`diffusion`.

`check` reads the configuration (schedule, respacing, times of the losses) from the case's JSON and the
stand-in network's weights from its tensors, so that cases with other numbers work too. What the JSON does
not say was found by fitting: `p_*` and `condition_*` take in.x as x_t; `q_posterior_*` takes in.x as x_0,
its mirror image (last axis) as x_t, and times 3 and 7 of the respaced chain.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from diffusion import Level, Prediction, Schedule, ddim, ddpm, hybrid_loss, last, respaced
from diffusion.posterior import learned_log_variance, posterior_mean, posterior_variance, step_beta

SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}
POSTERIOR_STEPS = (3, 7)


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected) for the respaced times and for every out.* tensor of the case.

    Raises KeyError with the tensor's name for one that it does not know how to compute.
    """
    case = _Case(config, tensors)
    for spec, times in config["respacing"].items():
        yield (
            f"respacing.{spec}",
            torch.tensor(respaced(spec)[-2::-1]),
            torch.tensor(times, dtype=torch.float32),
        )
    yield (
        "timestep_map",
        torch.tensor([lv.t for lv in case.up[1:]]),
        torch.tensor(config["timestep_map"]).float(),
    )
    for key, expected in sorted(tensors.items()):
        if key.startswith("out."):
            yield key, case.compute(key.removeprefix("out.")), expected


class _Case:
    def __init__(self, config: dict, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.x, self.noise, self.weight = tensors["in.x"], tensors["in.noise"], tensors["in.W"].double()
        self.channels = self.x.shape[1]
        self.schedule = Schedule(SCHEDULES[config["schedule"]])
        self.levels = self.schedule.levels(respaced(config["respacing_used"], self.schedule.steps))
        self.up = self.levels[::-1]  # up[i + 1] is the reference's timestep i, up[i] what it steps to

    def compute(self, name: str) -> Tensor:
        rules: list[tuple[str, Callable[..., Tensor]]] = [
            (r"betas_(\w+)", lambda which: Schedule(SCHEDULES[which]).betas),
            (r"q_posterior_(\w+)", self.q_posterior),
            (r"(p_mean|p_variance|p_log_variance|p_pred_xstart)_step(\d+)(_noclip)?", self.p),
            (r"condition_mean_step(\d+)", self.condition_mean),
            (r"condition_score_(mean|pred_xstart)_step(\d+)", self.condition_score),
            (r"(ddim|ddpm)_chain(?:_eta([01]))?(?:_fixed_(small|large))?(_classifier_guided)?", self.chain),
            (r"loss(\d*)_(loss|mse|vb)", self.loss),
        ]
        for pattern, rule in rules:
            if match := re.fullmatch(pattern, name):
                return rule(*match.groups())
        raise KeyError(name)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """The stand-in network at original times t (B,): (B, 2C, H, W)."""
        out = torch.tanh(torch.einsum("oc,bchw->bohw", self.weight, x) + t.reshape(-1, 1, 1, 1) / 1000)
        return torch.cat([out[:, : self.channels], 0.5 * out[:, self.channels :]], dim=1)

    def cond_fn(self, x: Tensor, t: float) -> Tensor:
        return -0.5 * (x - 0.3) * (1 + t / 1000)

    def predict(self, x: Tensor, level: Level, clip: bool = True, guided: bool = False) -> Prediction:
        eps, raw = self.network(x, torch.full((len(x),), level.t, dtype=x.dtype)).chunk(2, dim=1)
        prediction = replace(Prediction.from_eps(x, eps, level.alpha_bar), var_frac=(raw + 1) / 2)
        prediction = prediction.clamped(x, level) if clip else prediction
        return replace(prediction, guide=self.cond_fn(x, level.t)) if guided else prediction

    def floor(self, step: int) -> float:
        """The posterior's variance, and at step 0 that of step 1, as the reference clips it."""
        step = max(step, 1)
        return posterior_variance(self.up[step + 1].alpha_bar, self.up[step].alpha_bar)

    def q_posterior(self, what: str) -> Tensor:
        now, below = (
            torch.tensor([self.up[i + d].alpha_bar for i in POSTERIOR_STEPS], dtype=torch.float64)
            for d in (1, 0)
        )
        if what == "mean":
            return posterior_mean(self.x, self.x.flip(-1), now, below)
        variance = posterior_variance(now, below).reshape(-1, 1, 1, 1).expand(self.x.shape)
        return variance.log() if what == "log_variance" else variance

    def p(self, what: str, step: str, noclip: str | None) -> Tensor:
        level, lower = self.up[int(step) + 1], self.up[int(step)]
        prediction = self.predict(self.x, level, clip=noclip is None)
        if what == "p_pred_xstart":
            return prediction.x0
        if what == "p_mean":
            return posterior_mean(prediction.x0, self.x, level.alpha_bar, lower.alpha_bar)
        large = step_beta(level.alpha_bar, lower.alpha_bar)
        log_variance = learned_log_variance(prediction.var_frac, self.floor(int(step)), large)
        return log_variance if what == "p_log_variance" else log_variance.exp()

    def condition_mean(self, step: str) -> Tensor:
        gradient = self.cond_fn(self.x, self.up[int(step) + 1].t)
        return self.p("p_mean", step, None) + self.p("p_variance", step, None) * gradient

    def condition_score(self, what: str, step: str) -> Tensor:
        level, lower = self.up[int(step) + 1], self.up[int(step)]
        x0 = self.predict(self.x, level, guided=True).guided(self.x, level).x0
        return x0 if what == "pred_xstart" else posterior_mean(x0, self.x, level.alpha_bar, lower.alpha_bar)

    def chain(self, sampler: str, eta: str | None, fixed: str | None, guided: str | None) -> Tensor:
        def denoise(x: Tensor, level: Level) -> Prediction:
            return self.predict(x, level, guided=guided is not None)

        noises = iter(self.noise[1:])
        with patch("diffusion.samplers.draw", lambda *_: next(noises)):
            if sampler == "ddim":
                return last(ddim(denoise, self.noise[0], self.levels, eta=float(eta or 0)))
            return last(ddpm(denoise, self.noise[0], self.levels, variance=fixed or "learned"))

    def loss(self, number: str, what: str) -> Tensor:
        note = self.config["losses" + number]
        t = torch.tensor([int(i) for i in re.search(r"\bt \((\d+(?:, *\d+)*)\)", note).group(1).split(",")])
        x_t = self.schedule.q_sample(self.x, t, self.noise[1])
        terms = hybrid_loss(self.schedule, self.network(x_t, t), self.x, t, self.noise[1])
        return {"mse": terms.mse, "vb": terms.vb, "loss": terms.mse + terms.vb}[what]
