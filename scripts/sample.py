"""Draw images for prompts.

    python scripts/sample.py --prompt "a dog" "a guide dog" --count 4
    python scripts/sample.py --model models/sd15 --concept frida.safetensors --prompt "a photo of <frida>"

Each image is a PNG named after its prompt and its seed; several also come together on sheet.png, a row a prompt.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from _command import run
from _memory import how
from _runs import new_folder, word_and_file
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import models
from guidance import GuidanceError, generate
from guidance.chain import Model
from guidance.inputs import batches
from inversion.concept import Concept
from inversion.images import read_images
from models.replacing import replacing


@dataclass
class Config:
    prompt: tuple[str, ...]
    """What to draw: one or several; for a model of classes their names or numbers."""
    model: str = "emoji"
    """emoji, emoji-glide, emoji-classes, glide, adm-64, a folder, a .safetensors, .ckpt or .pt file, or a hub id."""
    negative: str = ""
    """What to keep away from."""
    count: int = 1
    """Images of each prompt."""
    seed: int = 0
    """Of the first image of each prompt; the others count on from it."""
    steps: int | None = None
    """Of the sampler; None is what suits the model, here and for the next two."""
    scale: float | None = None
    """Of the guidance: 1 is off."""
    sampler: str | None = None
    """ddpm, ddim, plms, euler, euler_ancestral, dpmpp_2m or dpmpp_2m_karras."""
    size: int | None = None
    """Side of the square images, in pixels; None is the model's own."""
    concept: tuple[str, ...] = ()
    """Files of learned words that the prompts use; WORD=FILE gives one another name, or chooses among several."""
    image: Path | None = None
    """An image to start from, cropped to a square, instead of noise; with an upsampler, what it enlarges."""
    strength: float | None = None
    """With --image, how much of the way to noise and back is gone: above 0, at most 1; None is 0.8."""
    dtype: str | None = None
    """float32, bfloat16, float16, or auto for the fastest here; None is the file's own, but no float16 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one."""
    variant: str | None = None
    """fp16, for the smaller files of a folder or hub id that has them."""
    offload: Literal["none", "idle", "stream"] = "none"
    """What leaves the device (on a CPU: memory) while it does not compute: text transformer and VAE, or the layers of
    the UNet, too."""
    prediction: str | None = None
    """epsilon or v_prediction, for single files of Stable Diffusion 2.x that do not say."""
    batch_size: int = 8
    """Images drawn at once."""
    output: Path | None = None
    """Where the images go; None is a new folder, outputs/<time>-samples."""


def read_concepts(files: tuple[str, ...], model: Model, texts: tuple[str, ...]) -> list[Concept]:
    """The learned words, each of which must stand in one of the texts."""
    named = [word_and_file(file) for file in files]
    concepts = [Concept.load(file, model.width, word, model.family) for word, file in named]
    for word in (concept.placeholder for concept in concepts if model.tokenizer.is_word(concept.placeholder)):
        shadowed = f"the learned word {word} takes the place of the model's own {word!r}: rename it by '<{word}>=FILE'"
        warnings.warn(shadowed, UserWarning, stacklevel=2)
    for word in {concept.placeholder for concept in concepts}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                            # of what is cut off drawing warns, too
            tokens = model.tokenizer.encode(texts, {word: 1})
        if not ((tokens.ids >= model.tokenizer.vocab_size).any() or any(word in cut for cut in tokens.cut)):
            raise GuidanceError(f"no prompt has the learned word {word}: write it into one")
    return concepts


def write_png(path: Path, image: Tensor) -> None:
    """(3, H, W) in [-1, 1], written beside `path` and renamed."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)      # (H, W, 3)
    with replacing(path) as beside:
        Image.fromarray(pixels.numpy()).save(beside, format="PNG")


def draw(config: Config) -> Iterator[Tensor]:
    """`count` images a prompt, prompt after prompt, a batch as soon as it is drawn: (b, 3, size, size)."""
    model = models.load(
        config.model, dtype=config.dtype, device=config.device, prediction=config.prediction, variant=config.variant,
        **how(config),
    )  # fmt: skip
    size = model.resolution if config.size is None else config.size
    prompts = [prompt for prompt in config.prompt for _ in range(config.count)]
    seeds = [config.seed + i for i in range(config.count)] * len(config.prompt)
    parts = batches(len(prompts), config.batch_size)
    concepts = read_concepts(config.concept, model, (*config.prompt, config.negative))
    image = read_images([config.image], size // model.factor) if config.image else None
    # shown with the first step, not before what is refused or warned of, and however soon the last one comes
    with tqdm(desc="sampling", unit="step", mininterval=0, delay=1e-6) as bar:

        def step_done(_: int, of: int) -> None:
            bar.total = len(parts) * of
            bar.update()

        for part in parts:
            texts = *prompts[part], config.negative
            used = [concept for concept in concepts if any(concept.placeholder in text for text in texts)]
            yield generate(
                model, prompts[part], negative=config.negative, steps=config.steps, scale=config.scale,
                sampler=config.sampler, height=size, width=size, generator=seeds[part], concepts=used, image=image,
                strength=config.strength, batch_size=config.batch_size, progress=step_done,
            )  # fmt: skip


def main(config: Config) -> None:
    """Draw, and write each picture when it is there."""
    output = new_folder(config.output, "samples")
    if config.count < 1:
        raise GuidanceError(f"--count is at least 1, not {config.count}")
    if not config.prompt:
        raise GuidanceError("--prompt names nothing to draw: give at least one text")
    images: list[Tensor] = []
    for image in (image for batch in draw(config) for image in batch):
        i, j = divmod(len(images), config.count)
        name = re.sub(r"\W+", "-", config.prompt[i].lower())[:40].strip("-")
        write_png(output / f"{i:02d}-{name}-seed{config.seed + j}.png", image)
        images.append(image)
    if len(images) > 1:
        rows = [torch.cat(images[i : i + config.count], dim=2) for i in range(0, len(images), config.count)]
        write_png(output / "sheet.png", torch.cat(rows, dim=1))
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} to {output}")


if __name__ == "__main__":
    run(main)
