"""Train a classifier that reads noise on a folder of classes: a subfolder each, named after it.

    python scripts/train_classifier.py --images data/emoji/classes --output runs/classifier

It learns from pictures noised to times drawn uniformly, as they come up in a sampler's chain, so that the gradient of
log p(y | x_t) means something at every step (Dhariwal & Nichol 2021, section 4). Printed at the end, and written to
accuracy.json: how often it is right at ten levels of noise, of the pictures that it learned from and of held-out ones.
What is written is the moving average of the weights at the save whose loss on the held-out pictures was the lowest: a
classifier that knows its pictures by heart is sure of everything, and such a gradient guides nowhere.

With --noisiest 1 it reads clean pictures only: a judge. Interrupted with Ctrl-C it saves first; the same command with
--resume continues with the same numbers bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from _classes import Classes, every_tenth, read_classes, varied
from _command import run
from _flags import begun
from _runs import write_json
from _training import Trainer, run_steps
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from diffusion import Schedule
from inversion.training import digest, step_generator
from models import ModelError, load_classifier
from models.class_file import write_classifier
from models.classifier import Classifier, ClassifierConfig
from models.unet import UNetConfig

LEVELS = 10
Rows = list[tuple[int, float, float]]     # time, accuracy, loss


@dataclass
class Config:
    """images: a folder with a subfolder a class, which a new run needs; with --resume every flag is the interrupted
    run's. held_out: such a folder that nothing is learned from; None holds back every tenth picture of each class.

    size: of the images, in pixels. attention_resolutions: levels with attention, as downsampling factors. norm_groups:
    of every norm, as in train_diffusion.py. schedule: of the noise; that of the diffusion
    model which is to be guided. noisiest: times are drawn below it. vary: pictures are mirrored, and moved and scaled
    by up to this part of their side; 0 takes them as they are. dtype: of the network; masters are float32.
    """

    images: Path | None = None
    held_out: Path | None = None
    output: Path = Path("runs/classifier")
    size: int = 64
    model_channels: int = 64
    channel_mult: tuple[float, ...] = (1, 1, 2)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (4,)
    head_channels: int = 32
    norm_groups: int = 16
    schedule: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    noisiest: int = 1000
    vary: float = 0.15
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    save_every: int = 250
    resume: bool = False


def require_pictures(config: Config) -> None:
    """Raise ModelError unless the flags say which pictures, and what is done to them."""
    if config.images is None:
        raise ModelError("say what to learn from: --images FOLDER, with a subfolder of pictures a class")
    if not 0 <= config.vary < 1:
        raise ModelError(f"--vary is a part of the side, 0 to 1, not {config.vary}")
    if not 1 <= config.noisiest <= 1000:
        raise ModelError(f"--noisiest is a number of times, 1 to 1000, not {config.noisiest}")


def untrained(config: Config, classes: Classes) -> Classifier:
    """The network that the flags describe, in guided-diffusion's form."""
    torch.manual_seed(config.seed)
    descent = UNetConfig(
        3, len(classes.names), config.model_channels, config.channel_mult, config.num_res_blocks,
        config.attention_resolutions, None, config.head_channels, 0, attention="self_legacy", resblock_updown=True,
        scale_shift=True, norm_groups=config.norm_groups,
    )  # fmt: skip
    return Classifier(ClassifierConfig(descent, config.size), classes.names)


def logits_at(network: Classifier, schedule: Schedule, images: Tensor, t: Tensor, g: torch.Generator) -> Tensor:
    """Logits (B, classes), float32, of images (B, 3, H, W) noised to times t (B,)."""
    x_t = schedule.q_sample(images, t, torch.randn(images.shape, generator=g))
    return network(x_t.to(next(network.parameters()).dtype), t).float()


def answers(network: Classifier, schedule: Schedule, pictures: Classes, t: int) -> Tensor:
    """Logits (N, classes) of all pictures at one time; the noise is always the same."""
    g = step_generator(2**30, t)
    batches = pictures.images.split(256)
    return torch.cat([logits_at(network, schedule, x, torch.full((len(x),), t), g) for x in batches])


@torch.no_grad()
def by_noise(network: Classifier, schedule: Schedule, pictures: Classes, noisiest: int) -> Rows:
    """Accuracy and loss at levels of noise evenly below the noisiest."""
    rows = []
    for t in sorted({i * noisiest // LEVELS for i in range(LEVELS)}):
        logits = answers(network, schedule, pictures, t)
        right = (logits.argmax(dim=1) == pictures.labels).float().mean().item()
        rows.append((t, right, cross_entropy(logits, pictures.labels).item()))
    return rows


def export(network: Classifier, trainer: Trainer, file: Path, dtype: torch.dtype, judge: Callable[[], Rows]) -> None:
    """Write the network with averaged weights, in float16, if the held-out loss is lower than ever; then go on."""
    network.float()
    trainer.put(trainer.average)
    rows = judge()
    accuracy, loss = (sum(row[i] for row in rows) / len(rows) for i in (1, 2))
    better = loss < trainer.best
    tqdm.write(f"step {trainer.step}: held out {accuracy:.1%} right, loss {loss:.3f}{', the best yet' * better}")
    if better:
        trainer.best = loss
        write_classifier(network, file, torch.float16)
    network.to(dtype)
    trainer.put(trainer.master)


def report(file: Path, schedule: Schedule, parts: dict[str, Classes], config: Config) -> None:
    """Print a table of accuracies by noise of the classifier that was written, and write accuracy.json."""
    network = load_classifier(file, torch.float32, "cpu")
    of = {name: by_noise(network, schedule, part, config.noisiest) for name, part in parts.items()}
    print("  ".join(["time", *(f"{name:>8}" for name in of)]))
    for rows in zip(*of.values()):
        print("  ".join([f"{rows[0][0]:4}", *(f"{right:8.1%}" for _, right, _ in rows)]))
    counts = torch.bincount(torch.cat([part.labels for part in parts.values()]))
    print(f"the most frequent of the {len(counts)} classes is {counts.max() / counts.sum():.1%} of the pictures")
    found = {name: [dict(zip(("time", "accuracy", "loss"), row)) for row in rows] for name, rows in of.items()}
    write_json(config.output / "accuracy.json", found)


def main(config: Config) -> None:
    """Train, writing classifier.safetensors at every save that is better than the ones before."""
    config = begun(config)
    require_pictures(config)
    every = read_classes(config.images, config.size)
    learned, held_out = every_tenth(every) if config.held_out is None else (
        every, read_classes(config.held_out, config.size, every.names)
    )  # fmt: skip
    network, schedule, dtype = untrained(config, every), Schedule(config.schedule), getattr(torch, config.dtype)
    what = learned.images, learned.labels, held_out.images, held_out.labels, str(every.names.names)
    taught = " ".join(map(digest, what))
    trainer = Trainer({"classifier": network}, config.learning_rate, config.steps, 100, 0.995, dtype, taught=taught)
    checkpoint, file = config.output / "training.pt", config.output / "classifier.safetensors"
    trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        which = torch.randint(len(learned), (config.batch_size,), generator=g)
        images = varied(learned.images[which], config.vary, g)
        t = torch.randint(config.noisiest, (len(which),), generator=g)
        return cross_entropy(logits_at(network, schedule, images, t, g), learned.labels[which])

    judge = partial(by_noise, network, schedule, held_out, config.noisiest)
    for step, _ in run_steps(trainer, checkpoint, loss, config, config.save_every):
        if step % config.save_every == 0 and step < config.steps:
            export(network, trainer, file, dtype, judge)
    export(network, trainer, file, dtype, judge)
    report(file, schedule, {"learned": learned, "held out": held_out}, config)
    print(f"wrote {file}")


if __name__ == "__main__":
    run(main)
