"""Does it matter what a new word starts from? One word, ten copies of it, and a phrase, on the same validation set.

    python scripts/compare_starts.py --model runs/glide/model.safetensors

The article's question: is "<frida>" better begun as "dog", as ten times "dog", or as "large white and light brownish
retriever dog"? Each start is trained once a seed, as train_inversion.py would. A table is printed: the fixed
validation loss of the start, and of the best vectors. With --picture, a sheet of what each draws over the same seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from _command import run
from _recipes import PHOTOGRAPHS, RECIPES, Recipe
from _runs import require_places, write_json
from tqdm import tqdm
from train_inversion import EXAMPLE, Model, require_base

import inversion
import models
from guidance import generate
from inversion import Concept, InversionError
from inversion.report import comparison

COPIES = 10


@dataclass
class Config:
    """model, images, token: as in train_inversion.py. name: the concept in plain words, for a loss to compare with.

    word, phrase: the starts are one vector of the word, ten copies of it, and one vector a token of the phrase.
    seeds: trainings of each start. steps: of each; None is what suits the model. samples: columns of the picture.
    output: a JSON file for the numbers, written after every training.
    """

    model: str = "emoji"
    images: Path = EXAMPLE
    token: str = "<poodle>"
    name: str = "poodle"
    word: str = "dog"
    phrase: str = "large white and light blue dog"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    samples: int = 6
    picture: Path | None = None
    output: Path | None = None


def starts(model: Model, config: Config) -> dict[str, Concept]:
    """The three, under what the table calls them."""
    of = {
        f"“{config.word}”": (config.word, 1),
        f"{COPIES} × “{config.word}”": (config.word, COPIES),
        f"“{config.phrase}”": (config.phrase, None),
    }
    return {label: Concept.from_text(model, config.token, *given) for label, given in of.items()}


def table(results: dict[str, list[inversion.Result]]) -> list[str]:
    """A line a start: vectors, the loss before, the best of each seed, and how far that is below, on average."""
    width = max(map(len, results))
    seeds = len(next(iter(results.values())))
    lines = [f"{'start':{width}}  vectors  initial  {'best, a seed each':{8 * seeds - 2}}  change"]
    for label, several in results.items():
        first, best = ([result.metrics[f"validation_loss_{key}"] for result in several] for key in ("initial", "best"))
        losses = "  ".join(f"{loss:.4f}" for loss in best)
        change = mean(best) / first[0] - 1
        count = len(several[0].concept.vectors)
        lines.append(f"{label:{width}}  {count:7}  {first[0]:7.4f}  {losses:{max(17, 8 * seeds - 2)}}  {change:+.1%}")
    return lines


def main(config: Config) -> None:
    """Train every start with every seed, print the table, draw."""
    if not config.seeds:
        raise InversionError("--seeds needs at least one number")
    if config.phrase == config.word:
        raise InversionError(f"--phrase {config.phrase} is the word itself, one start and not two: give another phrase")
    if config.samples < 1:
        raise InversionError(f"--samples is how many columns the picture has, at least 1, not {config.samples}")
    require_places(picture=config.picture, output=config.output)
    files, model = inversion.find_images(config.images), require_base(models.load(config.model))
    recipe = RECIPES.get(model.family, PHOTOGRAPHS)
    settings = [recipe.settings(seed, steps=config.steps) for seed in config.seeds]
    images = inversion.read_images(files, model.resolution)
    prompts = inversion.templates_for(files, inversion.read_templates(recipe.templates), config.token)
    results: dict[str, list[inversion.Result]] = {}
    with tqdm(total=3 * len(config.seeds), desc="trainings") as bar:
        for label, start in starts(model, config).items():
            for how in settings:
                result = inversion.train(model, start, images, prompts, how, name=config.name, keep_encoder=True)
                results.setdefault(label, []).append(result)
                bar.update()
                if config.output:
                    write_json(config.output, {label: [r.metrics for r in all_of] for label, all_of in results.items()})
    print("\n".join(table(results)))
    print(f"“{config.name}” as plain words: {result.metrics['validation_loss_caption']:.4f}")
    if config.picture:
        draw(config, model, recipe, images, {label: several[0].concept for label, several in results.items()})


def draw(config: Config, model: Model, recipe: Recipe, images: torch.Tensor, learned: dict[str, Concept]) -> None:
    """Write the picture: the images, what the word meant before, and what each start has become."""
    text, before = (recipe.prompt.replace("{}", word) for word in (config.token, config.word))
    rows = [("images to learn from", images[: config.samples])]
    prompts = {f"before: {before}": (before, ())} | {f"from {k}": (text, (concept,)) for k, concept in learned.items()}
    for label, (prompt, concepts) in prompts.items():
        drawn = generate(
            model, [prompt] * config.samples, concepts=concepts, generator=0, batch_size=config.samples, progress=True
        )
        rows.append((label, drawn))
    comparison(config.picture, rows, [f"seed {i}" for i in range(config.samples)])


if __name__ == "__main__":
    run(main)
