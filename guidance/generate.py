"""Prompts to images.

    prompts, and what to keep away from → text features → x at the first level, from noise or from an image
    → a sampler over classifier-free guidance → x_0 → images → the same once more, larger, by an upsampler

Seeds: image i of a call has a random stream of its own, so it is the same picture whatever else the call
draws and however the call is cut into batches. Its stream is that of `torch.Generator().manual_seed(s)`.
With one seed, s is seed + i, so image i is also what the seed `seed + i` draws alone; with a seed for each
prompt, s is the i-th; with a generator, s is the i-th integer that it gives. Each stream gives, in this
order: the VAE's noise (only if there is an image to start from), the noise of the first level, and the
noise of each ancestral step, in float32 on the CPU; then the same for an upsampler.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from diffusion import Level, Schedule, default_levels, from_strength, respaced
from diffusion.samplers import require_sampler
from guidance import inputs
from guidance.chain import Chain, Model
from guidance.errors import GuidanceError
from guidance.gradient import Gradient
from guidance.pictures import pictures, reduced

Progress = bool | Callable[[int, int], None]


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
    strength: float | None = None,
    mask: Tensor | None = None,
    guidance: Gradient | None = None,
    batch_size: int = 8,
    progress: Progress = False,
) -> Tensor:
    """Draws one image for each prompt.

    prompts     B of them; the same one several times gives as many images of it. For a model of classes their names or
                numbers ("207"), for an unconditional one "".
    negative    what guidance moves away from, one for all or one a prompt; None is the empty prompt. At a scale of 1
                there is no moving away: a warning says so.
    steps       of the sampler, over the times that diffusers visits with it (`diffusion.default_levels`), or over
                those of `diffusion.respaced` with models that were published with these (GLIDE). Of many that begin
                where an image should be there already a warning is given.
    scale       null + scale · (conditional - null); at 1 and 0 the network reads one prompt, not two.
    sampler     a name of `diffusion.SAMPLERS`. Each of these three is the model's own, `model.sampling`, if None.
    height, width   in pixels; None is the model's own resolution. With an upsampler: of what it enlarges.
    generator   a seed, one seed for each prompt, a generator on the CPU, or None for torch's own; the module
                says what image i gets.
    concepts    learned words that the prompts and the negatives use; of one that none uses, and of <words> there that
                are none of them, a warning is given. An upsampler has a text network of its own: it reads the words
                that a concept was initialised with.
    image       (3, H, W) or (B, 3, H, W), floats in [-1, 1], to start from instead of noise; for an upsampler by
                itself, the small image that it enlarges.
    strength    with an image to start from: above 0 and at most 1, the part of the steps that is taken; None is 0.8.
    mask        (H, W) or (B, 1, H, W), with an image as large as the result: 1 where it stays, exactly, and 0 where
                it is drawn anew. For inpainting models; without a strength.
    guidance    a gradient to guide by besides: `guidance.classifier`, `clip_gradient`, or `gradient_of` a function of
                one's own. It is of all prompts together: batch_size must not be smaller than their number. It comes
                on top of the prompts' own guidance, whose scale 1 is off, as in GLIDE's notebook of CLIP.
    batch_size  images drawn at once.
    progress    True for a bar on stderr, or a function that is called with (steps done, steps in all).

    Returns (B, 3, H, W) float32 in [-1, 1] on the CPU. Raises GuidanceError for what does not fit together, and the
    model's and the process's errors (ModelError, DiffusionError) for a size, a sampler, its steps or a strength.
    """
    if not hasattr(model, "sampling"):
        raise GuidanceError(f"a {type(model).__name__} draws nothing: take a model of models.load")
    inputs.require_decoder(model)
    given = zip((sampler, steps, scale), model.sampling)
    sampler, steps, scale = (usual if chosen is None else chosen for chosen, usual in given)
    prompts, negatives = inputs.prompts(prompts, negative, scale)
    concepts = inputs.listed(concepts)
    inputs.require_kinds(guidance, progress)
    if model.factor > 1:
        (prompts, negatives), concepts = (inputs.in_plain_words(each, concepts) for each in (prompts, negatives)), ()
    inputs.require_sizes(height=height, width=width)
    inputs.require_two_sides(model, scale)
    batches = inputs.batches(len(prompts), batch_size)
    if guidance is not None and len(batches) > 1:
        raise GuidanceError(f"a gradient is of all {len(prompts)} images: raise batch_size to that")
    levels, upsampler = levels_of(model, sampler, steps), model.upsampler
    image, kept, small, sides = pictures(model, image, mask, len(prompts), height, width)
    if image is None and (said := inputs.late(sampler, levels, Schedule(**model.schedule))):
        warnings.warn(said, UserWarning, stacklevel=3)
    levels = _from_there_on(levels, image, strength)
    if guidance is not None and sampler != "ddpm" and 0 < levels[0].alpha_bar < inputs.GUIDED_FROM:
        warnings.warn(inputs.too_noisy(sampler, levels[0].alpha_bar), UserWarning, stacklevel=3)
    shape = model.x0_shape(*sides)
    streams, words = inputs.streams(generator, len(prompts)), inputs.words(concepts, model)
    inputs.warn_of_words(concepts, (*prompts, *negatives))
    chains = [Chain(model, prompts, negatives, scale, sampler, levels, shape, *words, image, kept, guidance)]
    if upsampler is not None:
        chains = [replace(chains[0], kept=reduced(kept, upsampler.factor)), enlarging(chains[0], concepts)]

    images = []
    with _counted(progress, len(batches) * sum(map(len, chains))) as step_done:
        for part in batches:
            drawn = None if small is None else small[part]
            for chain in chains:
                drawn = chain.draw(part, streams[part], drawn, step_done)                      # (b, 3, H, W)
            images.append(drawn.float().cpu())
            if not images[-1].isfinite().all():
                raise GuidanceError(
                    "what was drawn is not finite: the numbers left the range of their dtype, or the weights of the "
                    "model or the word are damaged; use a smaller guidance scale, or float32"
                )
    return torch.cat(images)


def _from_there_on(levels: list[Level], image: Tensor | None, strength: float | None) -> list[Level]:
    """The levels that are left to an image to start from. Raises GuidanceError for a strength without one."""
    if image is not None:
        return from_strength(levels, 0.8 if strength is None else strength)
    if strength is not None:
        raise GuidanceError(
            f"a strength, {strength}, says how much of an image goes that drawing starts from, and here it starts from "
            "noise: leave it out, or give a base model an image without a mask"
        )
    return levels


def levels_of(model: Model, sampler: str, steps: int | str) -> list[Level]:
    """The levels that a number of steps means with a model.

    Raises DiffusionError for a sampler that there is not, and for steps that the schedule has no room for.
    """
    schedule, spaced = Schedule(**model.schedule), isinstance(model.sampling.steps, str)
    require_sampler(sampler)
    if spaced and sampler != "dpmpp_2m_karras":                     # whose times follow from its sigmas
        return schedule.levels(respaced(str(steps), schedule.steps))
    return default_levels(schedule, sampler, int(steps) if spaced and str(steps).isdigit() else steps)


def enlarging(chain: Chain, concepts: Sequence[inputs.Concept]) -> Chain:
    """The chain of the upsampler of a chain's model, as that likes to be drawn with."""
    model = chain.model.upsampler
    prompts, usual = inputs.in_plain_words(chain.prompts, concepts), model.sampling
    shape = model.x0_shape(*(model.factor * side for side in chain.shape[1:]))
    levels = levels_of(model, usual.sampler, usual.steps)
    return Chain(model, prompts, [""] * len(prompts), usual.scale, usual.sampler, levels, shape, kept=chain.kept)


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
