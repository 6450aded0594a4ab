"""Does the model draw what the words say? Draw training captions and look up the nearest training image.

    python scripts/measure_fidelity.py --model emoji

Captions are picked at random (with a fixed seed) from those the model was trained on. Each drawing is encoded again,
and its latent compared with the latent of every training image, which train_diffusion.py leaves beside the model.
Printed: how often the nearest image bears the right name, how often one of the nearest five does.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from _command import run
from _runs import require_places, write_json
from torch import Tensor
from tqdm import tqdm

import models
from guidance import generate
from inversion.report import sheet
from models.errors import ModelError
from models.files import metadata, open_tensors
from models.loading import EMBEDDED


@dataclass
class Config:
    """model: "emoji" or a folder of train_diffusion.py. count: how many captions; at most one an image.

    steps, scale, sampler: None is what suits the model. sheet: a PNG to write, of the first sixteen drawings.
    """

    model: str = "emoji"
    count: int = 200
    seed: int = 0
    steps: int | None = None
    scale: float | None = None
    sampler: str | None = None
    batch_size: int = 25
    output: Path | None = None
    sheet: Path | None = None


def read_training_set(folder: Path) -> tuple[Tensor, list[str], list[str]]:
    """Latent means (N, C, h, w) float32 of the training images, their names, and one caption of each."""
    file = folder / "training_latents.safetensors"
    if not file.is_file():
        raise ModelError(
            f"{folder} has no {file.name}: name the model's folder, OUTPUT/model, of a training of train_diffusion.py "
            "with --vae that has ended"
        )
    latents, said = open_tensors(file).get("latents"), metadata(file).get("rows")
    if latents is None or said is None:
        raise ModelError(f"{file} holds no latents of train_diffusion.py's: name a folder that it wrote")
    try:
        rows = [(row["name"], row["caption"]) for row in json.loads(said)]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} does not name its images as train_diffusion.py does ({error!r})") from error
    return latents / 16, [name for name, _ in rows], [caption for _, caption in rows]


def ranks_of_names(drawn: Tensor, training: Tensor, names: list[str], wanted: list[str]) -> Tensor:
    """For each drawing (M, C, h, w), how many training images (N, C, h, w) lie nearer than any of the wanted name.

    Returns (M,) int64; 0 is best.
    """
    order = torch.cdist(drawn.flatten(1), training.flatten(1)).argsort(dim=1)
    return torch.tensor([[names[i] for i in row].index(name) for row, name in zip(order.tolist(), wanted)])


def main(config: Config) -> None:
    """Draw, look up, count."""
    if config.count < 1:
        raise ModelError(f"--count is how many captions to draw, at least 1, not {config.count}")
    if config.batch_size < 1:
        raise ModelError(f"--batch-size is how many captions to draw at once, at least 1, not {config.batch_size}")
    require_places(sheet=config.sheet, output=config.output)
    folder = EMBEDDED.get(config.model, Path(config.model))
    training, names, captions = read_training_set(folder)
    model = models.load(config.model)
    g = torch.Generator().manual_seed(config.seed)
    picked = torch.randperm(len(names), generator=g)[: config.count].tolist()
    drawings = []
    for i in tqdm(range(0, len(picked), config.batch_size), desc="drawing"):
        prompts = [captions[j] for j in picked[i : i + config.batch_size]]
        drawings += generate(
            model, prompts, steps=config.steps, scale=config.scale, sampler=config.sampler,
            generator=config.seed + i,
        )  # fmt: skip
    latents = model.moments(torch.stack(drawings)).chunk(2, dim=1)[0].cpu()
    ranks = ranks_of_names(latents, training, names, [names[j] for j in picked])
    found = {f"top{k}": (ranks < k).float().mean().item() for k in (1, 5)}
    print(f"{len(picked)} captions over {len(set(names))} concepts. The nearest training image shows the named one for")
    print(f"{found['top1']:.1%}; one of the nearest five does for {found['top5']:.1%}")
    if config.sheet:
        sheet(config.sheet, torch.stack(drawings[:16]), [captions[j] for j in picked[:16]])
    if config.output:
        write_json(config.output, found | {"captions": len(picked)})


if __name__ == "__main__":
    run(main)
