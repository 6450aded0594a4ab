"""Train a diffusion model on images: of captions (UNet and text transformer together), of classes, or of nothing else.

    python scripts/train_diffusion.py --data data/emoji/captioned --vae runs/vae --output runs/emoji
    python scripts/train_diffusion.py --data data/emoji/captioned --size 32 --output runs/glide
    python scripts/train_diffusion.py --data data/emoji/captioned --size 64 --factor 2 --output runs/upsampler
    python scripts/train_diffusion.py --told classes --data data/emoji/classes --size 32 --output runs/classes
    python scripts/train_diffusion.py --told nothing --data photos --size 32 --output runs/ddpm

Told captions: with an autoencoder, which stays as it is, a latent diffusion model of v; without one a GLIDE, of the
pixels themselves, on the squared error of eps and the variational bound of its variance (Nichol & Dhariwal 2021,
equation 16); with a factor the upsampler of a GLIDE, of v, which is shown each image that many times smaller. Told
classes, or nothing: a DDPM of pixels (Ho et al. 2020, algorithm 1), on the squared error of eps alone.

First a text transformer learns alone, to tell from a caption roughly what the picture looks like. (Stable
Diffusion's comes trained from CLIP. An untrained one learns next to nothing through a UNet that as yet ignores it: the
captions differ in a few of 32 tokens, and the noise in the gradient hides them.) Then both learn to denoise.

Captions and classes are replaced by the empty prompt with a set probability, so that the one network learns the
conditional and the unconditional score and can guide itself (Ho & Salimans 2022). Matrices learn by Muon, the rest by
AdamW: from one checkpoint, 200 steps of it left a training loss of 0.3145 where AdamW alone left 0.3237, at a third
more time a step.
The weights that are written are an exponential moving average; with held-out pictures, that of the save whose loss on
them was the lowest. (They are shown without captions, whose words the model may not have met; the loss rises when it
begins to know its own pictures by heart.) Interrupted with Ctrl-C it saves first; with --resume it continues with the
same numbers bit for bit.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from _command import run
from _flags import begun
from _lesson import Captions, Pictures
from _pictures import read_told
from _training import Trainer, run_steps
from _untrained import class_model, glide_model, latent_model
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import models
from diffusion import Schedule
from inversion.training import digest
from models import ClassModel, LatentModel, ModelError
from models.loading import Model
from models.weights import write_safetensors


@dataclass
class Config:
    """data: a folder with captions.jsonl, one {"file", "name", "captions"} a line; for classes a folder with a
    subfolder of images each; for nothing any folder of images. told: what the network is told beside the noisy image.

    With --resume every flag is the interrupted run's. held_out: such a folder of pictures to judge by: of all saves,
    the weights that know them best are written. vae: the output of train_vae.py. size: of the images; captioned ones
    are reduced to it by averaging, None leaves them as they are. factor: how many times an upsampler enlarges.
    norm_groups: of every norm, with at least two, better four, of the model_channels in each; one channel alone would
    lose its mean, and the network could say nothing of the mean colour (seen: the seed decided on it).
    text_steps: of the text transformer alone, with 64 captions each. caption_dropout: the probability of the empty
    prompt, of a class's absence as well. flip: learn from each image's mirror image too. dtype: of the networks;
    masters are float32.
    """

    data: Path | None = None
    told: Literal["captions", "classes", "nothing"] = "captions"
    held_out: Path | None = None
    vae: Path | None = None
    output: Path = Path("runs/emoji")
    size: int | None = None
    factor: int = 1
    model_channels: int = 64
    channel_mult: tuple[float, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (2,)
    head_channels: int = 64
    norm_groups: int = 32
    vocab_size: int = 1500
    context_length: int = 32
    text_width: int = 160
    text_layers: int = 3
    text_heads: int = 5
    text_steps: int = 1500
    caption_dropout: float = 0.1
    flip: bool = False
    steps: int = 12000
    batch_size: int = 32
    learning_rate: float = 1e-3
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    save_every: int = 500
    resume: bool = False


def reduced(images: Tensor, config: Config) -> Tensor | None:
    """What an upsampler is shown of images (N, 3, H, W): their mean over squares of `factor` pixels; None without."""
    if config.factor == 1:
        return None
    if config.vae is not None or config.factor < 1 or images.shape[-1] % config.factor:
        raise ModelError(
            f"an upsampler works on pixels, without --vae, and its --factor divides their {images.shape[-1]}: "
            f"{config.factor} cannot be"
        )
    return functional.avg_pool2d(images, config.factor)


def save_training_set(folder: Path, moments: Tensor, rows: list[dict]) -> None:
    """Leave the latents, names and one caption of each training image beside the model, for measure_fidelity.py.

    Latents are of variance 1 or so, and looked up by their distance: 8 bits, in steps of 1/16, are enough.
    """
    g = random.Random(0)
    described = [{"name": row["name"], "caption": g.choice(row["captions"])} for row in rows]
    latents = {"latents": (16 * moments.chunk(2, dim=1)[0]).round().clamp(-127, 127).to(torch.int8)}
    write_safetensors(folder / "training_latents.safetensors", latents, {"rows": json.dumps(described)})


def teach_text(model: Model, captions: Captions, latents: Tensor, config: Config, taught: str) -> None:
    """Train the text transformer on captions alone: its mean feature, through a linear head, tells the blurred x_0.

    The mean over all positions, because that is what a cross-attention sees that does not know yet where to look.

    model: its text network, float32, is trained in place. latents: (N, C, h, w), of the images that have the captions.
    Interrupted, it continues from output/text.pt, and does nothing if that is complete.
    """
    blurred = functional.adaptive_avg_pool2d(latents, 8).flatten(1)                            # (N, 64 C)
    head = nn.Linear(model.width, blurred.shape[1])
    trained = {"text": model.text.train(), "head": head}
    trainer = Trainer(trained, 1e-3, config.text_steps, warmup=50, decay=0.99, taught=taught)
    checkpoint = config.output / "text.pt"
    trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        which = torch.randint(len(latents), (64,), generator=g)
        features = model.encode_text(captions.of(which, g))
        return (head(features.context.mean(dim=1)) - blurred[which]).pow(2).mean()

    for _ in run_steps(trainer, checkpoint, loss, config, config.save_every):
        pass
    trainer.put(trainer.average)


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features: no table, and neither the first nor the last layer of the UNet."""
    outermost = name.startswith(("unet.input_blocks.0.", "unet.out."))
    table = "embedding" in name or "label_emb" in name
    return weight.ndim >= 2 and not table and not outermost


def weights_of(model: Model) -> list[str]:
    """What tells the autoencoder that a model is trained around, if there is one, from others."""
    return [digest(weight) for weight in model.vae.parameters()] if isinstance(model, LatentModel) else []


def networks(model: Model) -> dict[str, nn.Module]:
    """What is trained of a model."""
    return {"unet": model.unet} | ({} if isinstance(model, ClassModel) else {"text": model.text})


def export(model: Model, trainer: Trainer, folder: Path, dtype: torch.dtype, judge: Callable[[], float] | None) -> None:
    """Write the model with averaged weights, in float16, and go on training where we were.

    judge: the loss of held-out pictures, which then decides: only if it is lower than ever is anything written.
    """
    for network in networks(model).values():
        network.float()                                              # the average is float32, and so rounded once
    trainer.put(trainer.average)
    held_out = judge() if judge else -math.inf
    if judge:
        tqdm.write(f"step {trainer.step}: held-out loss {held_out:.4f}, the best before {trainer.best:.4f}")
    if held_out < trainer.best or not judge:
        trainer.best = held_out
        models.save(model, folder, dtype=torch.float16)
    for network in networks(model).values():
        network.to(dtype)
    trainer.put(trainer.master)


def main(config: Config) -> None:
    """Train, writing the averaged model to output/model, or without an autoencoder to output/model.safetensors, at
    every save; with held-out pictures, at every one that is better than those before.
    """
    config = begun(config)
    if config.data is None:
        raise ModelError("say what to learn from: --data FOLDER, of images with a captions.jsonl, or of classes")
    if config.told != "captions" and config.vae is not None:
        raise ModelError(f"a model told {config.told} draws pixels: leave --vae out")
    images, rows = read_told(config.told, config.data, config.size)
    images, rows = (torch.cat([images, images.flip(-1)]), rows * 2) if config.flip else (images, rows)
    small = reduced(images, config)
    build = class_model if config.told != "captions" else glide_model if config.vae is None else latent_model
    model = build(config, [caption for row in rows for caption in row["captions"]], images.shape[-1])
    schedule = Schedule(**model.schedule)
    shape, pictures = model.x0_shape(*images.shape[2:]), Pictures.of(model, images, small, rows)
    taught, judge = [digest(images), digest(str(rows)), *weights_of(model)], None
    if config.held_out is not None:
        images, held_rows = read_told(config.told, config.held_out, images.shape[-1], getattr(model, "classes", None))
        held_out = Pictures.of(model, images, reduced(images, config), held_rows)
        judge = partial(held_out.fixed_loss, model, schedule)
        taught += [digest(images), digest(str(held_rows))]

    checkpoint = config.output / "training.pt"
    if config.told == "captions" and not checkpoint.exists():
        teach_text(model, pictures.captions, pictures.moments[:, : shape[0]], config, " ".join(taught))
    dtype = getattr(torch, config.dtype)
    trained = {name: network.train() for name, network in networks(model).items()}
    decay = max(0.9, 1 - 6 / config.steps)           # the average remembers a sixth of the training: 0.9995 of 12000
    trainer = Trainer(
        trained, config.learning_rate, config.steps, 200, decay, dtype, is_hidden_matrix, " ".join(taught)
    )
    trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        return pictures.loss(model, schedule, config.batch_size, g, config.caption_dropout)

    written = config.output / ("model.safetensors" if config.vae is None else "model")
    for step, _ in run_steps(trainer, checkpoint, loss, config, config.save_every):
        if step % config.save_every == 0 and step < config.steps:
            export(model, trainer, written, dtype, judge)
    export(model, trainer, written, dtype, judge)
    if config.vae is not None:
        save_training_set(written, pictures.moments, rows)
    print(f"wrote {written}")


if __name__ == "__main__":
    run(main)
