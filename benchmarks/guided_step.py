"""A step of drawing with Stable Diffusion 1.5 under classifier-free guidance, 512x512, one image.

    python benchmarks/guided_step.py [--json FILE]

Both sides take a step of DDIM from text features that were computed once, the empty prompt's and the prompt's, in one
batch of two: ours as `guidance.generate` does, the peer as diffusers' StableDiffusionPipeline does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _measure import command, compare
from _networks import Peer, ours, peer
from _process import Side, Step, Work
from torch import Tensor, nn

from diffusion import SAMPLERS, Schedule, default_levels
from guidance import bind, classifier_free_pair
from models import LatentModel

WORKS = [Work("guided_step", "bfloat16", 512), Work("guided_step", "float32", 512)]
PROMPT, SCALE, STEPS = "a photograph of an astronaut riding a horse", 7.5, 50


def start_ours(model: LatentModel, work: Work) -> Step:
    """The loop of a sampler, a step at a time; returns x after it."""
    with torch.no_grad():
        features = model.encode_text(model.tokenizer.encode(["", PROMPT]))
    levels = default_levels(Schedule(**model.schedule), "ddim", STEPS)
    x = first(model.x0_shape(work.resolution, work.resolution))
    steps = SAMPLERS["ddim"](classifier_free_pair(bind(model, features, times=2), SCALE), x, levels)
    return torch.no_grad()(lambda: next(steps).x)


def start_peer(networks: Peer, work: Work) -> Step:
    """The same through diffusers."""
    with torch.no_grad():
        context = networks.text(networks.tokenizer.encode(["", PROMPT]).ids)[0]
    return peer_step(networks.unet, context, work)


def peer_step(unet: nn.Module, context: Tensor, work: Work) -> Step:
    """The body of the pipeline's loop; returns x after it. context: (2, L, D), the empty prompt's first."""
    scheduler = peer_scheduler()
    scheduler.set_timesteps(STEPS)
    side = unet.config.sample_size
    x, times = first((unet.config.in_channels, side, side)).to(unet.dtype), iter(scheduler.timesteps)

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal x
        t = next(times)
        null, conditional = unet(scheduler.scale_model_input(torch.cat([x, x]), t), t, context).sample.chunk(2)
        x = scheduler.step(null + SCALE * (conditional - null), t, x).prev_sample
        return x

    return step


def peer_scheduler() -> Any:
    """diffusers' DDIM as Stable Diffusion uses it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def first(shape: Sequence[int]) -> Tensor:
    """Noise of one image, (1, C, h, w), the same for all."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS."""
    for work in WORKS:
        yield from compare([work], Side(ours, start_ours), Side(peer, start_peer), rounds=5)


if __name__ == "__main__":
    command(__doc__, measure)
