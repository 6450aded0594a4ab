"""A step of textual inversion on Stable Diffusion 1.5, batch 1, against the step of diffusers' example script.

    python benchmarks/inversion_step.py [--json FILE]

Ours is a step of `inversion.Training`. The peer's is what textual_inversion.py of diffusers 0.42 does in one: the VAE
encodes the image, AdamW with weight decay moves the whole table of 49409 tokens, and the rows of all other words are
put back from a copy. As there, bfloat16 is that of UNet and VAE, and the text transformer is float32 under autocast.

low_memory is each side's thriftiest setting. The peer's is gradient checkpointing without attention slices, which in
training need more memory (each slice's probabilities are kept).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _measure import command, compare
from _networks import Peer, ours, peer
from _process import Side, Step, Work
from torch import Tensor

from inversion import Concept, TrainConfig, Training
from models import LatentModel

WORKS = [
    Work("inversion_step", "float32", 512),
    Work("inversion_step", "bfloat16", 512, "low_memory"),
    Work("inversion_step", "bfloat16", 512),
    Work("inversion_step", "float32", 256),
]
WORD, TEMPLATE, FOREVER = "<frida>", "a photo of a {}", 10**6
TRAINED_PEER = partial(peer, text_dtype=torch.float32, words=1)     # the example script's: the new word is the last


def image(work: Work) -> Tensor:
    """(1, 3, side, side) in [-1, 1]."""
    return torch.rand(1, 3, work.resolution, work.resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1


def start_ours(model: LatentModel, work: Work) -> Step:
    """A training, whose moments are encoded and whose VAE is gone. The first step validates first, with one sample."""
    if work.mode == "low_memory":
        model.checkpointing = "blocks"
    config = TrainConfig(
        FOREVER, batch_size=1, accumulation=1, schedule="constant", validate_every=FOREVER, validation_pairs=1
    )
    concept = Concept.from_text(model, WORD, "a", 1)
    steps = Training(model, concept, image(work), [[TEMPLATE]], config).steps()
    return lambda: next(steps)


def start_peer(networks: Peer, work: Work) -> Step:
    """The example script's preparation; the last row of the table is the new word."""
    unet, _, text, _ = networks
    text.train()
    if work.mode == "low_memory":
        unet.train()
        unet.enable_gradient_checkpointing()
        text.gradient_checkpointing_enable()
    table = text.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    original = table.detach().clone()
    others = torch.ones(len(table), dtype=torch.bool)
    others[-1] = False
    loss = peer_loss(networks, work)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[others] = original[others]

    return step


def peer_loss(networks: Peer, work: Work) -> Callable[[], Tensor]:
    """A function that draws x_0, a time and noise for the image, and returns the loss, a scalar."""
    from diffusers import DDPMScheduler

    unet, vae, text, tokenizer = networks
    pixels, ids = image(work).to(unet.dtype), tokenizer.encode([TEMPLATE.format(WORD)], {WORD: 1}).ids
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)

    def loss() -> Tensor:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, len(scheduler.betas), (1,))
        x_t = scheduler.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
            context = text(ids)[0]
        return F.mse_loss(unet(x_t, t, context.to(unet.dtype)).sample.float(), noise.float())

    return loss


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS."""
    for work in WORKS:
        yield from compare([work], Side(ours, start_ours), Side(TRAINED_PEER, start_peer))


if __name__ == "__main__":
    command(__doc__, measure)
