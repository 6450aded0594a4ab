"""What a diffusion model is taught: pictures under captions, and the loss of some of them at random times."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion import Schedule, hybrid_loss, mse, random_times, target
from inversion.training import step_generator
from models import ClassModel, Tokens
from models.loading import Model


class Captions:
    """The tokens of every caption of every image; each image has as many."""

    def __init__(self, tokenizer: Any, captions: list[list[str]]) -> None:
        several = [tokenizer.encode(of_one) for of_one in captions]
        self.ids, self.mask = (torch.stack([getattr(t, key) for t in several]) for key in ("ids", "mask"))  # (N, c, L)
        self.empty = tokenizer.encode([""])

    def of(self, which: Tensor, g: torch.Generator, dropout: float = 0.0) -> Tokens:
        """One caption each of the images `which` (B,), drawn at random, or the empty prompt with a probability."""
        form = torch.randint(self.ids.shape[1], which.shape, generator=g)
        dropped = torch.rand(len(which), 1, generator=g) < dropout
        ids = torch.where(dropped, self.empty.ids, self.ids[which, form])                      # (B, L)
        return Tokens(ids, torch.where(dropped, self.empty.mask, self.mask[which, form]), [""] * len(which))


@dataclass
class Pictures:
    """Images as a network is taught them: moments (N, ...), what an upsampler is shown (N, 3, h, w), and captions."""

    moments: Tensor
    small: Tensor | None
    captions: Captions

    @classmethod
    def of(cls, model: Model, images: Tensor, small: Tensor | None, rows: list[dict]) -> "Pictures":
        """From images (N, 3, H, W) and their rows."""
        moments = torch.cat([model.moments(batch) for batch in images.split(64)])
        captions = Captions(model.tokenizer, [row["captions"] for row in rows])
        return cls(moments, small, captions)

    def loss(self, model: Model, schedule: Schedule, b: int, g: torch.Generator, dropout: float) -> Tensor:
        """The mean loss of b images drawn at random, each with a caption, a time and noise."""
        which = torch.randint(len(self.moments), (b,), generator=g)
        tokens = self.captions.of(which, g, dropout)
        shape = model.x0_shape(model.resolution, model.resolution)
        noise = torch.randn(2, b, *shape, generator=g)
        x0 = model.draw_x0(self.moments[which], noise[0])
        t = random_times(b, schedule.steps, g)
        x_t = schedule.q_sample(x0, t, noise[1])
        shown = model if self.small is None else model.given(shape[1:], self.small[which], None, None)
        output = shown.predict(x_t, t, model.encode_text(tokens))
        return objective(model, schedule, output, x0, t, noise[1]).mean()

    @torch.no_grad()
    def fixed_loss(self, model: Model, schedule: Schedule) -> float:
        """The loss over 512 draws that are always the same; without captions, but with classes, which are known."""
        dropout = 0.0 if isinstance(model, ClassModel) else 1.0
        losses = [self.loss(model, schedule, 64, step_generator(2**30, i), dropout) for i in range(8)]
        return torch.stack(losses).mean().item()


def objective(model: Model, schedule: Schedule, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The loss of each sample (B,): on what the network predicts, and on its variance if it predicts one."""
    if output.shape[1] > x0.shape[1]:
        return sum(hybrid_loss(schedule, output, x0, t, noise, model.prediction))
    return mse(output, target(schedule, model.prediction, x0, t, noise))
