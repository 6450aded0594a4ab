"""The diffusion process: numbers and steps. Knows no network."""

from diffusion.denoiser import Denoiser, Prediction, predict
from diffusion.errors import DiffusionError
from diffusion.objective import hybrid_loss, min_snr_weight, mse, random_times, target, variational_bound
from diffusion.samplers import (
    SAMPLERS,
    State,
    ddim,
    ddpm,
    dpmpp_2m,
    draw,
    euler,
    euler_ancestral,
    last,
    plms,
)
from diffusion.schedule import LAST, Level, Schedule
from diffusion.steps import ddim_step, ddpm_step, dpmpp_2m_step
from diffusion.times import default_levels, from_strength, karras, leading, linspace, respaced, trailing

__all__ = [
    "LAST",
    "SAMPLERS",
    "Denoiser",
    "DiffusionError",
    "Level",
    "Prediction",
    "Schedule",
    "State",
    "ddim",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "default_levels",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "draw",
    "euler",
    "euler_ancestral",
    "from_strength",
    "hybrid_loss",
    "karras",
    "last",
    "leading",
    "linspace",
    "min_snr_weight",
    "mse",
    "plms",
    "predict",
    "random_times",
    "respaced",
    "target",
    "trailing",
    "variational_bound",
]
