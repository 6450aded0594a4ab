"""A loss that means something.

The training loss of a diffusion model is mostly the luck of the draw: at t near 0 nearly nothing is
predictable, near T nearly everything, so curves of different steps cannot be compared. Here the draw is made
once: every image, with fixed pairs of time and noise and a fixed template for each, evaluated without
anything random. The times of the pairs are stratified, for each image and for all together. Two evaluations
then differ by the vectors alone, and so do two trainings, whatever their seeds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion import Schedule
from inversion.concept import Concept
from inversion.objective import denoising_loss, random_batch

STREAM = 2**60  # the same for every training, and no step's: see `training.step_generator`


class Validation:
    """`pairs` fixed (time, noise) for each of N images.

    moments: (N, …), on the CPU. templates: of each image, with a slot. shape: (C, h, w) of x_0. batch_size:
    how many samples go through the network at once (the loss does not depend on it, but for rounding).
    """

    def __init__(
        self, model: Any, schedule: Schedule, moments: Tensor, templates: Sequence[Sequence[str]],
        shape: Sequence[int], pairs: int, batch_size: int,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.batch_size = model, schedule, batch_size
        every = torch.arange(len(moments) * pairs, device="cpu")  # sample j: image j % N, in the stratum j // N
        generator = torch.Generator().manual_seed(STREAM)
        self.batch = random_batch(moments, templates, every % len(moments), every, shape, schedule.steps, generator)

    @torch.no_grad()
    def loss(self, word: str, concept: Concept | None = None) -> float:
        """The mean loss with `word` in the templates' slots: a concept's placeholder, or plain words."""
        parts = self.batch.parts(self.batch_size)
        losses = [denoising_loss(self.model, self.schedule, part, word, concept) for part in parts]
        return torch.cat(losses).mean().item()
