"""Learn a word from a few images.

    python scripts/train_inversion.py
    python scripts/train_inversion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images photos \\
        --token "<frida>" --init "dog"

Without a flag the embedded model learns "<poodle>", a word that it has never met, from the example images
that come with it. The output folder gets the concept (a file of a few KB), metrics.json, loss.png, and
comparison.png: the images, samples with the initial word, and samples with the learned word, over the same
seeds. Ctrl-C saves before it leaves; `--resume FOLDER` continues with the same numbers, on a CPU bit for bit.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from _command import named, run
from _memory import HOW, how, show, within_budget
from _recipes import PHOTOGRAPHS, RECIPES, Recipe
from _runs import new_folder, resumed, save_flags, word_and_file, write_json
from torch import Tensor
from tqdm import tqdm

import inversion
import models
from guidance import generate
from inversion import Concept, InversionError, StepReport, TrainConfig, find_images, read_images
from inversion.formats import ENDINGS
from inversion.report import comparison, loss_curve

Model = models.LatentModel | models.GlideModel

EXAMPLE = Path(inversion.__file__).parent / "data" / "poodle"


@dataclass
class Config:
    model: str = "emoji"
    """emoji, emoji-glide, glide, a folder, a .safetensors, .ckpt or .pt file, or a hub id."""
    images: Path = EXAMPLE
    """A folder of images; a .txt beside an image, of the same stem, is its caption."""
    token: str = "<poodle>"
    """The new word."""
    init: str = "dog"
    """A word or phrase to start from, or the file of a concept; WORD=FILE if it holds several."""
    vectors: int | None = None
    """How many vectors the word has; None takes one a token of --init, at least eight with emoji, four with
    emoji-glide."""
    name: str | None = None
    """The concept in plain words, to compare with and to name the files; None strips the token."""
    templates: str | None = None
    """object, style, emoji, or a text file with {} for the word; None suits the model."""
    steps: int | None = None
    """None suits the model: 3000, with emoji 400, with emoji-glide 60."""
    batch_size: int | None = None
    """Images that go through the networks at once; None suits the model: 1, with GLIDE 4, with emoji 16."""
    accumulation: int | None = None
    """Batches whose gradients make one step; None suits the model: 4, with GLIDE and emoji 1."""
    learning_rate: float | None = None
    """None suits the model: 0.005, with emoji 0.01, with emoji-glide 0.02."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate, after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises."""
    patience: int | None = None
    """Stop after so many validations, of which there are about twelve, without progress; None goes to the end."""
    resolution: int | None = None
    """Side of the square images, in pixels; None is the model's own."""
    flip: bool = False
    """Learn from each image's mirror image too."""
    dtype: str | None = None
    """float32, bfloat16, float16, or auto for the fastest here; None is the file's own, but no float16 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one."""
    variant: str | None = None
    """fp16, for the smaller files of a folder or hub id that has them."""
    prediction: str | None = None
    """epsilon or v_prediction, for single files of Stable Diffusion 2.x that do not say."""
    checkpointing: Literal["none", "attention", "blocks"] | None = None
    """What is computed again instead of kept in memory; None is none, or what --memory-budget chooses, here and for the
    next two."""
    attention: Literal["auto", "sliced", "fused", "mixed"] | None = None
    """Its kernel: ours over slices, torch's, or torch's forward and ours backward; auto is the fastest."""
    offload: Literal["none", "idle", "stream"] | None = None
    """What leaves the device (on a CPU: memory) while it does not compute: text transformer and VAE, or the layers of
    the UNet, too."""
    memory_budget: str | None = None
    """What the device has to give, 6GiB for example: takes the fastest of the ways to run that fit. Leave 0.5 GiB of a
    GPU to its driver."""
    plan: bool = False
    """Only print what each way to run would take; the GPU need not be there, nor the weights."""
    samples: int = 6
    """Images to draw with either word, for comparison.png; 0 draws none."""
    seed: int = 0
    output: Path | None = None
    """A new folder to write into; None is outputs/<time>-<name>."""
    resume: Path | None = None
    """The output folder of an interrupted run, to continue it with the flags it was started with."""


def main(config: Config) -> None:
    """Learn, write, draw."""
    if config.samples < 0:
        raise InversionError(f"--samples is how many images to draw with either word, 0 or more, not {config.samples}")
    if config.plan:
        if config.resume:
            given = dataclasses.replace(config, plan=False, memory_budget=None)
            was = resumed(config.resume, given, HOW, named() - {"plan", "memory_budget"})
            config = dataclasses.replace(was, memory_budget=config.memory_budget)
        show(config, *planning(config))
        return
    output = config.resume or new_folder(config.output, slug(config), "--resume FOLDER")
    if config.resume:
        config = resumed(output, config, HOW, named())
    elif config.memory_budget is not None:
        shell, *sizes = planning(config)
        at_once = RECIPES.get(shell.family, PHOTOGRAPHS).batch_size
        config = within_budget(config, shell, *sizes, drawn=min(at_once, max(1, config.samples)))
    files, model = find_images(config.images), load(config, upsampler=False)
    recipe = RECIPES.get(model.family, PHOTOGRAPHS)
    size = model.resolution if config.resolution is None else config.resolution
    model.x0_shape(size, size)
    start, images = starting_concept(config, model, recipe.vectors), read_images(files, size)
    templates = inversion.read_templates(recipe.templates if config.templates is None else config.templates)
    prompts = inversion.templates_for(files, templates, config.token)
    inversion.check_prompts(model.tokenizer, start, prompts)

    names = ("steps", "batch_size", "accumulation", "learning_rate", "schedule", "warmup", "patience")
    settings = recipe.settings(config.seed, **{name: getattr(config, name) for name in names})
    name, file = plain_name(config), output / f"{slug(config)}.safetensors"
    seen, prompts = (torch.cat([images, images.flip(-1)]), prompts * 2) if config.flip else (images, prompts)
    save_flags(output, config)
    with progress(config.token, settings.steps, output) as on_step:
        resume = inversion.state_file(file).exists()
        result = inversion.train(
            model, start, seen, prompts, settings, name=name, file=file, resume=resume, on_step=on_step
        )
    report(output, name, result, settings)
    del model  # there need not be room for two
    if config.samples:
        draw(config, output, recipe, images, [start, result.concept])
    print(f"wrote {output}")


def planning(config: Config) -> tuple[Model, int, int]:
    """The model without its weights, the side of the images, and how many go through it at once."""
    shell = require_base(models.outline(config.model, config.prediction))      # without its weights
    recipe = RECIPES.get(shell.family, PHOTOGRAPHS)
    side = shell.resolution if config.resolution is None else config.resolution
    return shell, side, recipe.batch_size if config.batch_size is None else config.batch_size


def load(config: Config, upsampler: bool = True) -> Model:
    """The model that the flags name. Raises ModelError for one that cannot draw by itself."""
    model = models.load(
        config.model, dtype=config.dtype, device=config.device, prediction=config.prediction, variant=config.variant,
        upsampler=upsampler, **how(config),
    )  # fmt: skip
    return require_base(model)


def require_base(model: Model) -> Model:
    """The model. Raises ModelError for an upsampler, and for a model of classes."""
    if not model.width:
        raise models.ModelError(f"{model.source} is told classes and reads no words: name a model that draws from text")
    if model.factor > 1:
        raise models.ModelError(
            f"{model.source} is an upsampler, which learns no word: name the base network, or the folder of both"
        )
    return model


def starting_concept(config: Config, model: Model, at_least: int) -> Concept:
    """From a concept's file if --init names one, else from the vectors of its words."""
    word, file = word_and_file(config.init)
    if file.suffix not in ENDINGS:
        if len(file.name) < 256 and file.is_file():          # longer than any file's name
            raise InversionError(f"{file} is no file of learned vectors: those end in {', '.join(ENDINGS)}")
        vectors = config.vectors
        if vectors is None:
            vectors = max(at_least, len(model.tokenizer.tokens_of(config.init)))
        return Concept.from_text(model, config.token, config.init, vectors)
    loaded = Concept.load(file, model.width, word, model.family)
    if config.vectors not in (None, len(loaded.vectors)):
        raise InversionError(f"{config.init} holds {len(loaded.vectors)} vectors, not {config.vectors}")
    words = {key: value for key, value in loaded.metadata.items() if key == "init"}     # what an upsampler reads
    return Concept(config.token, loaded.vectors, words | {"init_file": str(file), "init_rule": "vectors of a file"})


def plain_name(config: Config) -> str:
    """The concept in plain words."""
    return config.name or re.sub(r"\W+", " ", config.token).strip() or "concept"


def slug(config: Config) -> str:
    """The concept's name as a file's, of at most 200 bytes: with an ending a file's name may have 255."""
    name = re.sub(r"\W+", "-", plain_name(config).lower()).strip("-")
    return name.encode()[:200].decode(errors="ignore") or "concept"


@contextmanager
def progress(token: str, steps: int, output: Path) -> Iterator[Callable[[StepReport], None]]:
    """A bar with the loss; after Ctrl-C, how to go on."""
    with tqdm(total=steps, desc=f"learning {token}", unit="step") as bar:
        bar.set_postfix_str("first the images are encoded and the start is measured")

        def on_step(step: StepReport) -> None:
            bar.initial = bar.initial if bar.n else step.step - 1     # a resumed run starts in the middle
            bar.set_postfix(loss=f"{step.loss:.4f}", best=f"{step.best_loss:.4f}", refresh=False)
            bar.update(step.step - bar.n)

        try:
            yield on_step
            if not bar.n:                                                 # a resumed run that had ended
                bar.set_postfix_str("it had learned to the end")
        except KeyboardInterrupt:
            bar.write(f"interrupted; continue with --resume {output}")
            raise


def report(output: Path, name: str, result: inversion.Result, settings: TrainConfig) -> None:
    """Write metrics.json and loss.png, and say in a line what came out."""
    numbers = {"name": name, **result.metrics, "settings": dataclasses.asdict(settings)}
    write_json(output / "metrics.json", numbers | {"history": result.history})
    first, best, words = (result.metrics[f"validation_loss_{key}"] for key in ("initial", "best", "caption"))
    loss_curve(output / "loss.png", result.history, (name, words))
    fell = f"{first:.4f} -> {best:.4f} ({best / first - 1:+.1%})"
    print(f"validation loss {fell}; of “{name}” as plain words {words:.4f}")
    if not result.metrics["best_step"]:
        print("no step was better than the start, which is what was written: try another learning rate")


def draw(config: Config, output: Path, recipe: Recipe, images: Tensor, concepts: Sequence[Concept]) -> None:
    """Write comparison.png: the images, and samples with each concept over the same seeds."""
    model, size, seeds = load(config), images.shape[-1], range(config.samples)
    rows, text = [("images to learn from", images[: config.samples])], recipe.prompt.replace("{}", config.token)
    init = Path(concepts[0].metadata.get("init_file", "")).name or f"“{config.init}”"
    for concept, label in zip(concepts, (f"before: {text}, started from {init}", f"learned: {text}")):
        drawn = generate(
            model, [text] * config.samples, height=size, width=size, concepts=[concept],
            generator=config.seed, batch_size=recipe.batch_size, progress=True,
        )  # fmt: skip
        rows.append((label, drawn))
    comparison(output / "comparison.png", rows, [f"seed {config.seed + i}" for i in seeds])


if __name__ == "__main__":
    run(main)
