"""What is minimised: the model's own denoising loss, on the images to learn from, over the vectors alone.

    v* = argmin_v  E_{x_0, prompt, t, eps} || f(x_t, t, c(prompt; v)) - target ||²   (Gal et al. 2022, eq. 2)

x_0 is drawn from the cached moments of an image, x_t from q(x_t | x_0), and the target is eps or v, whichever
the model predicts. Times are stratified: a batch of B cuts the T times into B equal strata and draws one from
each, which leaves every sample uniform and makes the mean vary less.

A `Batch` holds everything that is random, drawn beforehand; from then on nothing is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion import Schedule, mse, random_times, target
from inversion.concept import Concept
from inversion.prompts import SLOT, unique_prompts
from models import TextFeatures


@dataclass(frozen=True)
class Batch:
    """moments: (B, …) as the model gave them, on the CPU. templates: B lines with a slot. t: (B,) int64.

    draw: (B, C, h, w), the noise that draws x_0 from its moments; noise: (B, C, h, w), the eps of q(x_t |
    x_0).
    """

    moments: Tensor
    templates: list[str]
    t: Tensor
    draw: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def parts(self, size: int) -> Iterator["Batch"]:
        """The same samples in pieces of at most `size`."""
        for i in range(0, len(self), size):
            yield Batch(*(field[i : i + size] for field in vars(self).values()))


def random_batch(
    moments: Tensor, templates: Sequence[Sequence[str]], which: Tensor, choice: Tensor,
    shape: Sequence[int], steps: int, generator: torch.Generator,
) -> Batch:  # fmt: skip
    """Draw times and noise for chosen images and templates.

    moments: (N, …). templates: of each image. which: (B,) int64 images. choice: (B,) int64, any numbers,
    taken modulo the number of an image's templates. shape: (C, h, w) of x_0. steps: T. generator: on the CPU.
    """
    size = len(which)
    chosen = [templates[i][c % len(templates[i])] for i, c in zip(which.tolist(), choice.tolist())]
    t = random_times(size, steps, generator)  # (B,)
    how = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    draw, noise = (torch.randn(size, *shape, **how) for _ in range(2))  # (B, C, h, w)
    return Batch(moments[which], chosen, t, draw, noise)


def denoising_loss(model: Any, schedule: Schedule, batch: Batch, word: str, concept: Concept | None = None) -> Tensor:
    """The loss of each sample, (B,) float32, with `word` in the templates' slots.

    model: see `training`. concept: the learned word, if it is one; gradients reach its vectors if they ask for them.
    """
    device = model.device
    features = encode_prompts(model, [line.replace(SLOT, word) for line in batch.templates], concept)
    x0, t = model.draw_x0(batch.moments.to(device), batch.draw.to(device)), batch.t             # (B, C, h, w), (B,)
    noise = batch.noise.to(x0)                                                  # float64 where x_0 is
    x_t = schedule.q_sample(x0, t, noise)
    output = model.predict(x_t, t, features)[:, : x0.shape[1]]                  # without a learned variance
    return mse(output, target(schedule, model.prediction, x0, t, noise))


@torch.enable_grad()
def loss_and_gradient(
    model: Any, schedule: Schedule, batch: Batch, concept: Concept, samples: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A batch's part in the mean loss of a step, (), float32, and its gradient in the word's vectors, (n, D).

    concept: its vectors ask for a gradient. samples: of the whole step. scale: a factor on the way back, taken off at
    its end, so that small gradients survive in float16.
    """
    loss = denoising_loss(model, schedule, batch, concept.placeholder, concept).sum() / samples
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss * scale, concept.vectors, allow_unused=True)
    return loss.detach(), torch.zeros_like(concept.vectors) if gradient is None else gradient / scale


def encode_prompts(model: Any, prompts: Sequence[str], concept: Concept | None) -> TextFeatures:
    """Run the text transformer once a distinct prompt, and hand each prompt its features.

    Returns context (B, L, D) and pooled (B, E) or None.
    """
    distinct, which = unique_prompts(prompts)
    placeholders = {} if concept is None else {concept.placeholder: len(concept.vectors)}
    tokens = model.tokenizer.encode(distinct, placeholders)
    features = model.encode_text(tokens, None if concept is None else concept.vectors)
    return TextFeatures(*(None if feature is None else _rows(feature, which) for feature in features))


def _rows(feature: Tensor, which: Tensor) -> Tensor:
    # advanced indexing adds its gradients in any order, on a CPU too
    return feature.index_select(0, which.to(feature.device))
