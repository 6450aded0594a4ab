"""`generate` against diffusers' Stable Diffusion pipelines.

One tiny model of random weights, written by `models.save` and read by diffusers, so that the schedulers'
settings are those that diffusers takes from a folder.
"""

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

import models
from diffusion import default_levels
from diffusion.schedule import Schedule
from guidance import generate
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs

SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "plms": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_karras": diffusers.DPMSolverMultistepScheduler,
}
PROMPTS, NEGATIVE = ["a photo of a dog", "a drawing of a large cat"], "a picture"
STEPS, SCALE, SEED = 6, 3.0, 40


@pytest.fixture(scope="module")
def model() -> models.LatentModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: models.LatentModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    models.save(model, path)
    return path


def pipeline(folder: Path, sampler: str, kind: type) -> diffusers.DiffusionPipeline:
    pipe = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    options = {"plms": {"skip_prk_steps": True}, "dpmpp_2m_karras": {"use_karras_sigmas": True}}
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config, **options.get(sampler, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def streams() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]


def agree(ours: Tensor, theirs: Tensor) -> None:
    """Pixels in [-1, 1]: float32 through 6 guided steps, and diffusers' tables are float32 too (1e-4)."""
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, 2 * theirs - 1, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image(model: models.LatentModel, folder: Path, sampler: str) -> None:
    ours = generate(
        model, PROMPTS, negative=NEGATIVE, steps=STEPS, scale=SCALE, sampler=sampler, generator=SEED,
        batch_size=1,
    )  # fmt: skip
    generators = streams()
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    if sampler.startswith("euler"):  # diffusers starts from sigma_max eps, here sqrt(1 - alpha_bar) eps
        noise = noise / (1 - default_levels(Schedule("scaled_linear"), sampler, STEPS)[0].alpha_bar) ** 0.5
    theirs = pipeline(folder, sampler, diffusers.StableDiffusionPipeline)(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=STEPS, guidance_scale=SCALE,
        latents=noise, generator=generators, height=16, width=16, output_type="pt",
    ).images  # fmt: skip
    agree(ours, theirs)


@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name != "plms"])
def test_image_to_image(model: models.LatentModel, folder: Path, sampler: str) -> None:
    """Not PLMS: diffusers cuts its list of times in the middle of the doubled first step."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours = generate(
        model, PROMPTS, negative=NEGATIVE, steps=STEPS, scale=SCALE, sampler=sampler, generator=SEED,
        image=images, strength=0.7,
    )  # fmt: skip
    theirs = pipeline(folder, sampler, diffusers.StableDiffusionImg2ImgPipeline)(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=STEPS, guidance_scale=SCALE,
        generator=streams(), image=(images + 1) / 2, strength=0.7, output_type="pt",
    ).images  # fmt: skip
    agree(ours, theirs)
