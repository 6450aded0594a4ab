"""What a caller may ask of `generate`, beside images (`pictures`): checked, and brought to one form.

Every refusal is a GuidanceError.
"""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion import Level, Schedule
from guidance.errors import GuidanceError

DRAWN_FROM = 0.04       # alpha_bar, a fifth of an image: the usual numbers of steps begin below 0.02
GUIDED_FROM = 1e-5      # alpha_bar: the linear schedule ends at 4e-5, from where classifiers are known to guide DDIM
WORD = re.compile(r"<[^\s<>|]+>")       # as learned words are usually written; <|…|> are a tokenizer's own
Randomness = int | Sequence[int] | torch.Generator | None


class Concept(Protocol):
    """A learned word: the `placeholder` that stands for it in prompts, and its `vectors` (n, D)."""

    placeholder: str
    vectors: Tensor


def prompts(
    prompts: str | Sequence[str], negative: str | Sequence[str] | None, scale: float
) -> tuple[list[str], list[str]]:
    """The prompts and as many negative ones."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
        raise GuidanceError(f"prompts are texts; got {prompts!r}")
    prompts, negative = list(prompts), "" if negative is None else negative
    try:
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    except TypeError:
        negatives = [negative]
    if not all(isinstance(each, str) for each in negatives):
        raise GuidanceError(f"negative prompts are texts; got {negative!r}")
    if not prompts:
        raise GuidanceError("there is no prompt: give at least one, the empty one if need be")
    if len(negatives) != len(prompts):
        raise GuidanceError(f"{len(negatives)} negative prompts for {len(prompts)}: give one, or as many")
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise GuidanceError(f"a guidance scale is a finite number (1 is off), not {scale!r}")
    if scale == 1 and any(negatives):
        said = "a guidance scale of 1 is off, so the negative prompt does nothing: raise the scale"
        warnings.warn(said, UserWarning, stacklevel=4)      # past `generate` and its no_grad
    return prompts, negatives


def require_decoder(model: Any) -> None:
    """Raise GuidanceError for a model that draws latents and has nothing any more to decode them with."""
    if getattr(model, "released", False):
        raise GuidanceError(
            "the model's VAE has left memory, as it does in training once the images are encoded: train with "
            "keep_encoder=True, or load the model again to draw with it"
        )


def require_kinds(guidance: Any, progress: Any) -> None:
    """Raise GuidanceError for what should be called and cannot be."""
    known = hasattr(guidance, "classes") or hasattr(guidance, "similarity")
    network = known and isinstance(guidance, nn.Module)                           # which is callable, too
    if guidance is not None and (network or not callable(guidance)):
        found = f"a {type(guidance).__name__}" if network else repr(guidance)
        raise GuidanceError(f"a gradient to guide by is one of guidance.classifier or the like, not {found}")
    if progress and progress is not True and not callable(progress):
        raise GuidanceError(f"progress is True, False, or a function of the steps done and in all, not {progress!r}")


def too_noisy(sampler: str, alpha_bar: float) -> str:
    """What to say of a gradient that is added to the score at such a level: x_0 moves by so many times as much."""
    return (
        f"{sampler} adds the gradient to the score, and where it begins, at alpha_bar {alpha_bar:.1g}, that moves x_0 "
        f"by {alpha_bar**-0.5:.0f} times the gradient: little of the image may be left; begin where there is less "
        "noise, as steps='ddim25' does for a model of pixels, or draw with ddpm"
    )


def late(sampler: str, levels: Sequence[Level], schedule: Schedule) -> str | None:
    """What to say of many steps that begin where an image should be there already, as DDIM's do if they do not divide
    the schedule's; None of few, which are a quick look, and where there is little but noise, or at no time.
    """
    steps, first = len(levels) - 1, levels[0]
    if steps <= schedule.steps // 8 or not first.alpha_bar > DRAWN_FROM > schedule.alphas_bar[-1]:
        return None
    return (
        f"{steps} steps of {sampler} begin at time {first.t:g} of {schedule.steps}, where {first.alpha_bar**0.5:.0%} "
        f"of an image should be there, and drawing begins with noise: take fewer, {max(schedule.steps // 20, 1)} for "
        "example, or euler"
    )


def require_sizes(**sizes: Any) -> None:
    """Raise GuidanceError for a size that is given and no whole number."""
    for name, size in sizes.items():
        if size is not None and not _is_whole(size):
            raise GuidanceError(f"{name} is a whole number, not {size!r}")


def require_two_sides(model: Any, scale: float) -> None:
    """Raise GuidanceError for a scale between two predictions of a model that has but one."""
    if scale not in (0, 1) and not getattr(model, "classes", True):
        raise GuidanceError(
            f"{model.source} draws no classes, so a guidance scale of {scale:g} has nothing to go by: leave it at 1, "
            "or guide by guidance.classifier"
        )


def in_plain_words(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Prompts with every learned word replaced by the words that it started from, or nothing."""
    plain = {concept.placeholder: getattr(concept, "metadata", {}).get("init", "") for concept in concepts}
    learned = _whole(plain)
    return [learned.sub(lambda found: plain[found[0]], prompt) for prompt in prompts]


def _whole(placeholders: Iterable[str]) -> re.Pattern[str]:
    """What finds learned words as the tokenizers of `models` do, which are not known here: the longest first, and none
    within a word.
    """
    edge = {True: r"(?!(?<=\w)\w)", False: ""}           # not between two characters of words
    names = sorted(placeholders, key=len, reverse=True)
    whole = [edge[bool(re.match(r"\w", n))] + re.escape(n) + edge[bool(re.search(r"\w\Z", n))] for n in names]
    return re.compile("|".join(whole) or r"(?!)")        # of none, nothing


def streams(generator: Randomness, count: int) -> list[torch.Generator]:
    """One generator an image, as `guidance.generate` says."""
    if not isinstance(generator, Integral | Sequence | torch.Generator | None):
        raise GuidanceError(f"a generator is a seed, a seed a prompt, or a torch.Generator, not {generator!r}")
    if isinstance(generator, Integral | Sequence):
        seeds = [int(generator) + i for i in range(count)] if isinstance(generator, Integral) else list(generator)
        if not all(isinstance(seed, Integral) for seed in seeds):
            raise GuidanceError(f"seeds are whole numbers, not {generator!r}")
        if len(seeds) != count:
            raise GuidanceError(f"{len(seeds)} seeds for {count} images: give one, or as many")
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise GuidanceError(f"a seed lies between 0 and 2^63, not at {generator}")
    else:
        if generator is not None and generator.device.type != "cpu":
            raise GuidanceError("noise is drawn on the CPU, for every device alike: give a CPU generator")
        seeds = [torch.randint(2**63 - 1, (), generator=generator, device="cpu").item() for _ in range(count)]
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def listed(concepts: Iterable[Concept]) -> list[Concept]:
    """The learned words. Raises GuidanceError for what is no list of them."""
    if hasattr(concepts, "placeholder"):
        raise GuidanceError("concepts is a list of learned words: put this one in brackets")
    found = list(concepts) if isinstance(concepts, Iterable) else [concepts]
    if not all(hasattr(each, "vectors") for each in found):
        raise GuidanceError(f"concepts is a list of learned words, each an inversion.Concept, not {concepts!r}")
    return found


def warn_of_words(concepts: Sequence[Concept], texts: Iterable[str]) -> None:
    """Warn of learned words that stand in none of the texts, and of <words> that nobody has learned: spelled otherwise,
    or not given, they are read as letters.
    """
    texts, given = list(texts), [each.placeholder for each in concepts]
    used = {word for text in texts for word in _whole(given).findall(text)}
    unused = [word for word in given if word not in used]
    found = [word for text in texts for word in WORD.findall(text) if not any(each in word for each in given)]
    said = []
    if unused:
        said.append(f"no prompt has {', '.join(unused)}: a learned word is drawn where it is written as it was learned")
    if found:
        unknown = ", ".join(dict.fromkeys(found))
        said.append(f"{unknown} is read as letters: if it is a learned word, give its file, or its concept, too")
    for each in said:
        warnings.warn(each, UserWarning, stacklevel=4)      # past `generate` and its no_grad


def words(concepts: Sequence[Concept], model: Any) -> tuple[dict[str, int], Tensor | None]:
    """The placeholders with their numbers of vectors, and all vectors (n, D) in that order."""
    for concept in concepts:
        family = getattr(concept, "metadata", {}).get("family")
        fits = concept.vectors.ndim == 2 and concept.vectors.shape[1] == model.width
        if not fits or family not in (None, model.family):
            raise GuidanceError(
                f"the vectors of {concept.placeholder} are {tuple(concept.vectors.shape)}, learned with "
                f"{family or 'another model'}, but this model's text encoder, {model.family}, reads "
                f"(n, {model.width}): use the family that the word was learned with"
            )
    vectors = [concept.vectors.float() for concept in concepts]
    placeholders = {concept.placeholder: len(concept.vectors) for concept in concepts}
    if len(placeholders) < len(concepts):
        names = ", ".join(concept.placeholder for concept in concepts)
        raise GuidanceError(f"two concepts go by one placeholder ({names}): rename one of them")
    return placeholders, torch.cat(vectors) if vectors else None


def batches(count: int, size: int) -> list[slice]:
    """`count` images in runs of at most `size`."""
    if not _is_whole(size):
        raise GuidanceError(f"batch_size is a whole number, not {size!r}")
    if size < 1:
        raise GuidanceError(f"a batch holds at least one image, not {size}")
    return [slice(i, i + size) for i in range(0, count, size)]


def _is_whole(number: Any) -> bool:
    """Whether it is an integer, NumPy's among them; True and False are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)
