"""How a training is done, as data."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from inversion.errors import InversionError

MOST = 2**14        # samples a step, whose times, noise and prompts are drawn together


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of one training.

    batch_size: samples through the network at once. accumulation: batches a step; the mean gradient of all of
    them is used, as of one batch of batch_size * accumulation, at most MOST. learning_rate: as it is used, never
    multiplied by anything. schedule: of the learning rate, after `warmup` steps, no more than all, in which it rises
    linearly. clip_norm: the gradient's largest norm. validate_every, checkpoint_every: in steps. validation_pairs:
    (time, noise) pairs an image. patience: stop after so many validations without progress; None never stops early.
    seed: 0 to 2^32 - 1. All other counts are at least 1, warmup 0; learning_rate and clip_norm are finite and above 0.

    Raises InversionError for any other value.
    """

    steps: int = 3000
    batch_size: int = 1
    accumulation: int = 4
    learning_rate: float = 5e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 0
    clip_norm: float = 1.0
    validate_every: int = 50
    validation_pairs: int = 8
    patience: int | None = None
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        counts = "steps", "batch_size", "accumulation", "validate_every", "validation_pairs", "checkpoint_every"
        least = dict.fromkeys(counts, 1) | {"warmup": 0, "seed": 0} | ({} if self.patience is None else {"patience": 1})
        for name, minimum in least.items():
            number = getattr(self, name)
            if not isinstance(number, Integral) or isinstance(number, bool):
                raise InversionError(f"{name} must be a whole number, not {number!r}")
            object.__setattr__(self, name, int(number))         # one of NumPy's is written to no file
            if number < minimum:
                raise InversionError(f"{name} must be at least {minimum}, not {number}")
        if self.batch_size * self.accumulation > MOST:
            raise InversionError(
                f"a step of {self.accumulation} batches of {self.batch_size} is more than {MOST} samples: take fewer"
            )
        if self.warmup > self.steps:
            raise InversionError(
                f"a warm-up of {self.warmup} steps is longer than the training, {self.steps}: the learning rate would "
                "never be reached"
            )
        for name in ("learning_rate", "clip_norm"):
            number = getattr(self, name)
            real = isinstance(number, Real) and not isinstance(number, bool)
            if not real or not (math.isfinite(number) and number > 0):
                raise InversionError(f"{name} must be a finite number above 0, not {number!r}")
            object.__setattr__(self, name, float(number))
        if self.seed >= 2**32:
            raise InversionError(f"a seed lies between 0 and {2**32 - 1}, {self.seed} does not")
        if self.schedule not in ("constant", "cosine"):
            raise InversionError(f"no learning-rate schedule is called {self.schedule!r}; use constant or cosine")

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps - 1: linear warm-up, then constant or half a cosine to 0."""
        if self.schedule == "constant" and step >= self.warmup:
            return self.learning_rate
        return self.learning_rate * cosine(step, self.steps, self.warmup)


def cosine(step: int, steps: int, warmup: int) -> float:
    """The fraction of a learning rate at a step, 0 … steps - 1: up to 1 in a line, down to 0 in half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
