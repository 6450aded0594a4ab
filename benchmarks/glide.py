"""What GLIDE costs at its real size, with random weights: a guided step, an upsampler step, an inversion step.

    python benchmarks/glide.py [--json FILE]

There is no peer that could be installed, so its columns stay empty. The guided step is of one image of 64x64; the
upsampler's is one prediction at 256x256; the inversion step is the gradient of a batch of four on one vector, through
text transformer and UNet. OpenAI's code on the same kind of machine (two cores, float32): 1.5 s a guided step; 7.3 s
and 4.4 GiB above the weights an inversion step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from _measure import GIB, command, compare
from _networks import fill
from _process import Side, Step, Work

from diffusion import Level, Schedule
from guidance import bind, classifier_free_pair
from inversion import Concept
from inversion.objective import denoising_loss, random_batch
from models import GlideModel
from models.glide_text import GlideText
from models.glide_tokenizer import GlideTokenizer
from models.presets import GLIDE
from models.unet import UNet

WORKS = [
    Work(work, dtype, resolution)
    for work, resolution in (("glide_guided_step", 64), ("glide_upsampler_step", 256), ("glide_inversion_step", 64))
    for dtype in ("float32", "bfloat16")
]
PROMPT, BATCH, DOG = "an oil painting of a corgi", 4, 3290
TEMPLATES = ["a photo of {}", "a picture of {} in the snow", "{} up close", "one {} in a garden"]


def network_of(work: Work) -> str:
    """The name of the network that does it."""
    return "upsample" if work.work == "glide_upsampler_step" else "base"


def build(work: Work) -> GlideModel:
    """One of the two networks in the dtype of the work."""
    preset = GLIDE[network_of(work)]
    with torch.device("meta"):
        networks = UNet(preset.unet), GlideText(preset.text)
    unet, text = (fill(network, getattr(torch, work.dtype)) for network in networks)
    return GlideModel(
        unet, text, GlideTokenizer.gpt2(), preset.schedule, preset.resolution, preset.factor, preset.inpaints,
        f"random {preset.resolution}",
    )  # fmt: skip


def start(model: GlideModel, work: Work) -> Step:
    """The step that the work is named after."""
    return {"glide_guided_step": guided, "glide_upsampler_step": upsampler, "glide_inversion_step": inversion}[
        work.work
    ](model)


@torch.no_grad()
def guided(model: GlideModel) -> Step:
    """One guided prediction of one 64x64 image: two prompts through the UNet."""
    features = model.encode_text(model.tokenizer.encode(["", PROMPT]))
    denoise, x = classifier_free_pair(bind(model, features), 3.0), torch.randn(1, 3, 64, 64)
    return torch.no_grad()(lambda: denoise(x, Level(500.0, 0.5)))


@torch.no_grad()
def upsampler(model: GlideModel) -> Step:
    """One prediction of one 256x256 image."""
    features = model.encode_text(model.tokenizer.encode([PROMPT]))
    denoise = bind(model.given((256, 256), torch.rand(1, 3, 64, 64) * 2 - 1, None, None), features)
    x = torch.randn(1, 3, 256, 256)
    return torch.no_grad()(lambda: denoise(x, Level(500.0, 0.5)))


def inversion(model: GlideModel) -> Step:
    """The gradient of a batch's loss on one vector."""
    schedule, generator = Schedule(**model.schedule), torch.Generator().manual_seed(0)
    images, shape = torch.rand(BATCH, 3, 64, 64) * 2 - 1, (3, 64, 64)
    every = torch.arange(BATCH)
    batch = random_batch(images, [TEMPLATES] * BATCH, every, every, shape, schedule.steps, generator)
    concept = Concept("<x>", model.embedding(DOG)[None])

    def step() -> object:
        vectors = concept.vectors.clone().requires_grad_()
        loss = denoising_loss(model, schedule, batch, "<x>", Concept("<x>", vectors)).mean()
        return torch.autograd.grad(loss, vectors)

    return step


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS; below each its memory with the weights."""
    for work in WORKS:
        (row,) = compare([work], Side(build, start), None, rounds=2)
        yield row
        if row["ours_bytes_over_weights"] is not None:
            print(f"{'':40} with its weights {(row['ours_bytes_over_weights'] + weights(work)) / GIB:.2f} GiB")


def weights(work: Work) -> int:
    """The bytes of a work's two networks."""
    preset = GLIDE[network_of(work)]
    with torch.device("meta"):
        networks = UNet(preset.unet), GlideText(preset.text)
    return sum(p.numel() for network in networks for p in network.parameters()) * getattr(torch, work.dtype).itemsize


if __name__ == "__main__":
    command(__doc__, measure)
