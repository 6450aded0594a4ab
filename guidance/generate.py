"""Prompts to images with a latent diffusion model.

    prompts, and what to keep away from → text features → x at the first level, from noise or from an image
    → a sampler over classifier-free guidance → x_0 → images

Seeds: image i of a call has a random stream of its own, so it is the same picture whatever else the call
draws and however the call is cut into batches. Its stream is that of `torch.Generator().manual_seed(s)`.
With one seed, s is seed + i, so image i is also what the seed `seed + i` draws alone; with a seed for each
prompt, s is the i-th; with a generator, s is the i-th integer that it gives. Each stream gives, in this
order: the VAE's noise (only if there is an image to start from), the noise of the first level, and the
noise of each ancestral step, in float32 on the CPU.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion import SAMPLERS, Denoiser, Level, Schedule, default_levels, draw, from_strength
from guidance import inputs
from guidance.classifier_free import bind, classifier_free_pair

Progress = bool | Callable[[int, int], None]


class Model(Protocol):
    """What `models.LatentModel` offers and images need."""

    tokenizer: Any
    schedule: dict[str, Any]
    prediction: str
    resolution: int
    width: int
    device: torch.device
    sampling: tuple[str, int, float]  # the sampler, its steps and the guidance scale that suit it

    def encode_text(self, tokens: Any, extra: Tensor | None = None) -> Any: ...
    def predict(self, x_t: Tensor, t: Tensor, features: Any) -> Tensor: ...
    def moments(self, images: Tensor) -> Tensor: ...
    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor: ...
    def decode(self, x0: Tensor) -> Tensor: ...
    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]: ...


@torch.no_grad()
def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    steps: int | None = None,
    scale: float | None = None,
    sampler: str | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: inputs.Randomness = None,
    concepts: Sequence[inputs.Concept] = (),
    image: Tensor | None = None,
    strength: float = 0.8,
    batch_size: int = 8,
    progress: Progress = False,
) -> Tensor:
    """Draws one image for each prompt.

    prompts     B of them; the same one several times gives as many images of it.
    negative    what guidance moves away from, one for all or one a prompt; None is the empty prompt.
    steps       of the sampler, over the times that diffusers visits with it (`diffusion.default_levels`).
    scale       null + scale · (conditional - null); at 1 and 0 the network reads one prompt, not two.
    sampler     a name of `diffusion.SAMPLERS`. Each of these three is the model's own, `model.sampling`, if None.
    height, width   in pixels; None is the model's own resolution.
    generator   a seed, one seed for each prompt, a generator on the CPU, or None for torch's own; the module
                says what image i gets.
    concepts    learned words that the prompts and the negatives may use.
    image       (3, H, W) or (B, 3, H, W), floats in [-1, 1], to start from instead of noise.
    strength    with an image: above 0 and at most 1, the part of the steps that is taken.
    batch_size  images drawn at once.
    progress    True for a bar on stderr, or a function that is called with (steps done, steps in all).

    Returns (B, 3, H, W) float32 in [-1, 1] on the CPU. Raises GuidanceError for what does not fit together,
    and the model's and the process's errors (ModelError, DiffusionError) for a size, a sampler or its steps.
    """
    given = zip((sampler, steps, scale), model.sampling)
    sampler, steps, scale = (usual if chosen is None else chosen for chosen, usual in given)
    prompts, negatives = inputs.prompts(prompts, negative, scale)
    levels = default_levels(Schedule(**model.schedule), sampler, steps)
    if image is not None:
        image = inputs.start(image, len(prompts), height, width)
        (height, width), levels = image.shape[2:], from_strength(levels, strength)
    shape = model.x0_shape(*(model.resolution if side is None else side for side in (height, width)))
    streams, words = inputs.streams(generator, len(prompts)), inputs.words(concepts, model.width)
    batches = inputs.batches(len(prompts), batch_size)

    images = []
    with _counted(progress, len(batches) * (len(levels) - 1)) as step_done:
        for part in batches:
            denoise = _denoiser(model, prompts[part], negatives[part], scale, *words)
            x = _first(model, shape, levels[0], streams[part], None if image is None else image[part])
            for state in SAMPLERS[sampler](denoise, x, levels, generator=streams[part]):
                x = state.x                                                                    # (b, C, h, w)
                step_done()
            images.append(model.decode(x).float().cpu())                                       # (b, 3, H, W)
    return torch.cat(images)


def _denoiser(
    model: Model,
    prompts: list[str],
    negatives: list[str],
    scale: float,
    placeholders: dict[str, int],
    extra: Tensor | None,
) -> Denoiser:
    """The guided denoiser of these prompts; at scale 1 or 0 only the half that counts is encoded."""
    asked = {0: negatives, 1: prompts}.get(scale, negatives + prompts)
    features = model.encode_text(model.tokenizer.encode(asked, placeholders), extra)
    denoise = bind(model, features)
    return denoise if scale in (0, 1) else classifier_free_pair(denoise, scale)


def _first(
    model: Model, shape: tuple[int, ...], level: Level, streams: list[torch.Generator], image: Tensor | None
) -> Tensor:
    """x at the first level: N(0, I), or a draw of q(x_t | x_0) of the images."""

    def noise() -> Tensor:
        return draw((len(streams), *shape), streams).to(model.device)

    if image is None:
        return noise()
    x0 = model.draw_x0(model.moments(image.to(model.device)), noise())
    return level.alpha_bar**0.5 * x0 + (1 - level.alpha_bar) ** 0.5 * noise()


@contextmanager
def _counted(progress: Progress, total: int) -> Iterator[Callable[[], object]]:
    """What to call after each step."""
    if progress is True:
        from tqdm import tqdm

        with tqdm(total=total, desc="sampling", unit="step") as bar:
            yield bar.update
    elif progress:
        count = itertools.count(1)
        yield lambda: progress(next(count), total)
    else:
        yield lambda: None
