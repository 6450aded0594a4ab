"""How a word is learned and drawn with each family of models, where the flags leave it open."""

from dataclasses import dataclass
from typing import Any

from inversion import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """What suits a family of models; a flag that is None takes it from here."""

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    validation_pairs: int
    templates: str
    prompt: str
    vectors: int
    """At least; a phrase of more tokens takes one for each."""

    def settings(self, seed: int, **chosen: Any) -> TrainConfig:
        """How to train. chosen: fields of a TrainConfig, where they are not None, over what suits the family."""
        names = ("steps", "batch_size", "accumulation", "learning_rate", "validation_pairs")
        numbers = {key: getattr(self, key) for key in names}
        numbers |= {key: value for key, value in chosen.items() if value is not None}
        return TrainConfig(**numbers, validate_every=max(1, round(numbers["steps"] / 12)), seed=seed)


RECIPES = {
    "emoji": Recipe(400, 16, 1, 1e-2, 16, "emoji", "an emoji of {}", 8),
    "emoji-glide": Recipe(60, 16, 1, 2e-2, 32, "emoji", "an emoji of {}", 4),
    "glide": Recipe(3000, 4, 1, 5e-3, 8, "object", "a photo of {}", 1),
}
PHOTOGRAPHS = Recipe(3000, 1, 4, 5e-3, 8, "object", "a photo of {}", 1)
