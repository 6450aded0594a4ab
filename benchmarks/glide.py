"""What GLIDE costs at its real size, with random weights: a guided step, an upsampler step, an inversion step.

    python benchmarks/glide.py [--json FILE]

The guided step is of one image of 64x64; the upsampler's is one prediction at 256x256; the inversion step is the
gradient of a batch of four, through text transformer and UNet: ours on one vector, the peer's on its token table, which
is what it has.

The peer is OpenAI's own code, in float32. Its columns stay empty unless it is installed, which no registry allows:

    pip install git+https://github.com/openai/glide-text2im
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _measure import GIB, command, compare
from _networks import fill
from _openai import is_installed, openai_network
from _process import Side, Step, Work
from torch import Tensor, nn

from diffusion import Level, Schedule
from guidance import bind, classifier_free_pair
from inversion import Concept
from inversion.objective import Batch, denoising_loss, random_batch
from inversion.prompts import SLOT
from models import GlideModel
from models.glide_text import GlideText
from models.glide_tokenizer import BYTES_AND_END, GlideTokenizer
from models.presets import GLIDE, GlidePreset
from models.tokenizer import Tokens
from models.unet import UNet

WORKS = [
    Work(work, dtype, resolution)
    for work, resolution in (("glide_guided_step", 64), ("glide_upsampler_step", 256), ("glide_inversion_step", 64))
    for dtype in ("float32", "bfloat16")
]
PROMPT, SCALE, TIME, BATCH, DOG = "an oil painting of a corgi", 3.0, 500, 4, 3290
TEMPLATES = ["a photo of {}", "a picture of {} in the snow", "{} up close", "one {} in a garden"]


class Peer(NamedTuple):
    """OpenAI's network; the tokenizer is ours."""

    network: nn.Module
    preset: GlidePreset
    tokenizer: GlideTokenizer


def preset_of(work: Work) -> GlidePreset:
    """The network that does it."""
    return GLIDE["upsample" if work.work == "glide_upsampler_step" else "base"]


def ours(work: Work, preset: GlidePreset | None = None) -> GlideModel:
    """The network in the dtype of the work."""
    preset = preset or preset_of(work)
    with torch.device("meta"):
        networks = UNet(preset.unet), GlideText(preset.text)
    unet, text = (fill(network, getattr(torch, work.dtype)) for network in networks)
    return GlideModel(
        unet, text, tokenizer_of(preset), preset.schedule, preset.resolution, preset.factor, preset.inpaints,
        f"random {preset.resolution}",
    )  # fmt: skip


def peer(work: Work, preset: GlidePreset | None = None) -> Peer:
    """OpenAI's."""
    preset = preset or preset_of(work)
    return Peer(fill(openai_network(preset), getattr(torch, work.dtype)), preset, tokenizer_of(preset))


def tokenizer_of(preset: GlidePreset) -> GlideTokenizer:
    """GPT-2's, or as much of it as the vocabulary has room for."""
    return GlideTokenizer(GlideTokenizer.gpt2().merges[: preset.text.vocab_size - BYTES_AND_END], preset.text.length)


def start_ours(model: GlideModel, work: Work) -> Step:
    """The step that the work is named after."""
    steps = {"glide_guided_step": guided, "glide_upsampler_step": upsampler, "glide_inversion_step": inversion}
    return steps[work.work](model)


def start_peer(networks: Peer, work: Work) -> Step:
    """The same with OpenAI's network."""
    steps = {
        "glide_guided_step": peer_guided, "glide_upsampler_step": peer_upsampler,
        "glide_inversion_step": peer_inversion,
    }  # fmt: skip
    return steps[work.work](networks)


@torch.no_grad()
def guided(model: GlideModel) -> Step:
    """One guided prediction of eps for one image: two prompts through the UNet."""
    features = model.encode_text(model.tokenizer.encode(["", PROMPT]))
    denoise, x = classifier_free_pair(bind(model, features), SCALE), image(model.resolution)
    return torch.no_grad()(lambda: denoise(x, Level(float(TIME), 0.5)).eps)


def peer_guided(networks: Peer) -> Step:
    """The same; the text transformer's answer is kept, too."""
    tokens, x = networks.tokenizer.encode(["", PROMPT]), image(networks.preset.resolution)
    look = kept(networks.network, tokens)

    def step() -> Tensor:
        null, conditional = look(torch.cat([x, x]), torch.full((2,), TIME))[:, :3].chunk(2)
        return null + SCALE * (conditional - null)

    return step


@torch.no_grad()
def upsampler(model: GlideModel) -> Step:
    """One prediction of eps for one image, from another of a quarter of its size."""
    features = model.encode_text(model.tokenizer.encode([PROMPT]))
    x, low = image(model.resolution), image(model.resolution // model.factor)
    denoise = bind(model.given(x.shape[2:], low, None, None), features)
    return torch.no_grad()(lambda: denoise(x, Level(float(TIME), 0.5)).eps)


def peer_upsampler(networks: Peer) -> Step:
    """The same; its notebook rounds the smaller image to 8 bits, too."""
    preset = networks.preset
    x, low = image(preset.resolution), image(preset.resolution // preset.factor)
    low = ((low + 1) * 127.5).round() / 127.5 - 1
    look = kept(networks.network, networks.tokenizer.encode([PROMPT]))
    return lambda: look(x, torch.tensor([TIME]), low_res=low)[:, :3]


def inversion(model: GlideModel) -> Step:
    """The gradient of a batch's loss on one vector, (1, D)."""
    schedule, batch = drawn(model.schedule, model.resolution)
    concept = Concept("<x>", model.embedding(DOG)[None])

    def step() -> Tensor:
        vectors = concept.vectors.clone().requires_grad_()
        loss = denoising_loss(model, schedule, batch, "<x>", Concept("<x>", vectors)).mean()
        return torch.autograd.grad(loss, vectors)[0]

    return step


def peer_inversion(networks: Peer) -> Step:
    """The same batch's, on the table, (V, D), with the same token in the slots."""
    network, preset, tokenizer = networks
    schedule, batch = drawn(preset.schedule, preset.resolution)
    tokens = tokenizer.encode([line.replace(SLOT, "<x>") for line in batch.templates], {"<x>": 1})
    ids = tokens.ids.masked_fill(tokens.ids == tokenizer.vocab_size, DOG)
    x_t = schedule.q_sample(batch.moments, batch.t, batch.noise)
    table = network.token_embedding.weight.requires_grad_()

    def step() -> Tensor:
        table.grad = None
        F.mse_loss(network(x_t, batch.t, tokens=ids, mask=tokens.mask)[:, :3], batch.noise).backward()
        return table.grad

    return step


def drawn(schedule: dict[str, Any], resolution: int) -> tuple[Schedule, Batch]:
    """Four images that are noise, each with its template."""
    process, generator, every = Schedule(**schedule), torch.Generator().manual_seed(0), torch.arange(BATCH)
    images, shape = torch.rand(BATCH, 3, resolution, resolution, generator=generator) * 2 - 1, (3, *2 * [resolution])
    return process, random_batch(images, [TEMPLATES] * BATCH, every, every, shape, process.steps, generator)


def image(side: int) -> Tensor:
    """Noise, (1, 3, side, side)."""
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))


def kept(network: nn.Module, tokens: Tokens) -> Callable[..., Tensor]:
    """OpenAI's network, with the features of these tokens kept after the first look, and no gradient."""
    network.cache_text_emb = True
    return torch.no_grad()(lambda x, t, **more: network(x, t, tokens=tokens.ids, mask=tokens.mask, **more))


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS; below each its memory with the weights."""
    openai = Side(peer, start_peer) if is_installed() else None
    for work in WORKS:
        (row,) = compare([work], Side(ours, start_ours), openai if work.dtype == "float32" else None, rounds=2)
        yield row
        if row["ours_bytes_over_weights"] is not None:
            print(f"{'':40} with its weights {(row['ours_bytes_over_weights'] + weights(work)) / GIB:.2f} GiB")


def weights(work: Work) -> int:
    """The bytes of a work's two networks."""
    preset = preset_of(work)
    with torch.device("meta"):
        networks = UNet(preset.unet), GlideText(preset.text)
    return sum(p.numel() for network in networks for p in network.parameters()) * getattr(torch, work.dtype).itemsize


if __name__ == "__main__":
    command(__doc__, measure)
