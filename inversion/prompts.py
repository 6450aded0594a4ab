"""The sentences that a word is learned in.

A template is a line of text with a slot `{}` for the word. A concept seen under many sentences cannot hide in
the wording of one, so it stays usable in new ones (Gal et al. 2022, section 3). Objects take neutral
descriptions of a photograph, styles take descriptions of a painting "in the style of" the word. Where a text
file lies beside an image (`photo.txt` for `photo.jpg`), its text replaces the templates for that image: what
the caption already says, the word need not learn.

Everything is checked before training, on token ids: that the word arrives in every prompt, and that its n
vectors fit the context together with the longest prompt.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inversion.concept import Concept, require_new_word
from inversion.errors import InversionError
from models.files import as_path
from models.tokenizer import placeholder_pattern

SLOT = "{}"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a photograph of {}",
        "one {} in a photo",
        "a picture showing {}",
        "a snapshot of {}",
        "a sharp photo of {}",
        "a blurry photo of {}",
        "a bright picture of {}",
        "a dark picture of {}",
        "a cropped picture of {}",
        "{} seen up close",
        "{} in the middle of the picture",
        "a detailed photo of {}",
        "a good picture of {}",
        "an amateur photo of {}",
        "a small {} in a picture",
        "a large {} in a picture",
        "a clean photo of {}",
        "a nice shot of {}",
        "an image of {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "an artwork in the style of {}",
        "a sketch in the style of {}",
        "an illustration in the style of {}",
        "a detailed picture in the style of {}",
        "a small painting in the style of {}",
        "a large canvas in the style of {}",
        "a dark scene in the style of {}",
        "a bright scene in the style of {}",
        "a colourful picture in the style of {}",
        "a quiet picture in the style of {}",
        "a landscape in the style of {}",
        "a portrait in the style of {}",
        "a still life in the style of {}",
        "part of a painting in the style of {}",
        "something drawn in the style of {}",
        "art made in the style of {}",
        "an image in the manner of {}",
    ),
    "emoji": (
        "{}",
        "an emoji of {}",
        "a picture of {}",
        "a drawing of {}",
    ),
}


def read_templates(choice: str) -> list[str]:
    """The templates of a set in `TEMPLATES`, or of a text file, one a line (empty lines are skipped).

    Raises InversionError for a file that is missing, empty, or has a line without a slot.
    """
    if choice in TEMPLATES:
        return list(TEMPLATES[choice])
    file = as_path(choice)
    if not file.is_file():
        sets = ", ".join(TEMPLATES)
        raise InversionError(f"no templates are called {choice!r} and no such file exists: use {sets} or a text file")
    lines = [line.strip() for line in _read_text(file).splitlines()]
    templates = [line for line in lines if line]
    if not templates:
        raise InversionError(f"{choice} holds no template: write one a line, with {SLOT} where the word goes")
    for template in templates:
        if SLOT not in template:
            raise InversionError(
                f"the template {template!r} in {choice} has no {SLOT}: the word would have no effect in it"
            )
    return templates


def templates_for(files: Sequence[str | Path], templates: Sequence[str], placeholder: str) -> list[list[str]]:
    """The templates of each image: its caption where a .txt of the same stem lies beside it, else all of them.

    A caption names the word by its placeholder, or by a slot. Raises InversionError for a caption with neither, and for
    one template by itself.
    """
    if isinstance(templates, str):
        raise InversionError(f"templates are a list of lines: put {templates!r} in brackets")
    found = []
    for file in map(as_path, files):
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            found.append(list(templates))
            continue
        caption = " ".join(_read_text(beside).split())
        word = placeholder_pattern({placeholder: 1})
        if SLOT not in caption and not word.search(caption):
            raise InversionError(
                f"the caption in {beside} does not contain {placeholder}, so the word would have no effect: "
                f"write {placeholder} where it belongs"
            )
        found.append([word.sub(SLOT, caption)])
    return found


def check_prompts(tokenizer: Any, concept: Concept, templates: Sequence[Sequence[str]]) -> None:
    """Raise InversionError unless the concept is a new word and arrives whole in every prompt.

    tokenizer: anything with `encode`, `tokens_of`, `is_word`, `vocab_size` and `room`, as `models.ClipTokenizer`.
    """
    n, word = len(concept.vectors), concept.placeholder
    require_new_word(tokenizer, word)
    if not templates or not all(templates):
        raise InversionError("there is no template to learn in: give at least one for every image")
    if line := next((several for several in templates if isinstance(several, str)), None):
        raise InversionError(
            f"templates are lists of lines, one for every image, and one is the line {line!r} by itself"
        )

    def length(template: str) -> int:
        return sum(len(tokenizer.tokens_of(part)) for part in template.split(SLOT))

    for template in sorted({template for several in templates for template in several}, key=length, reverse=True):
        rest, slots, room = length(template), template.count(SLOT), tokenizer.room
        if rest + slots * n > room:
            most = (room - rest) // slots if slots else 0
            remedy = f"use at most {most} vector{'s' * (most > 1)}, or" if most > 0 else "please"
            raise InversionError(
                f"{n} vector{'s' * (n > 1)} and the {rest} tokens of the template {textwrap.shorten(template, 80)!r} "
                f"are more than the {room} that fit the context: {remedy} shorten the template (or caption)"
            )
        ids = tokenizer.encode([template.replace(SLOT, word)], {word: n}).ids  # (1, L)
        if not slots or int((ids >= tokenizer.vocab_size).sum()) != slots * n:
            raise InversionError(
                f"{word} has no effect in the template {template!r}: put {SLOT} there, apart from other words"
            )


def unique_prompts(prompts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """The distinct prompts, in order of appearance, and for each prompt (B,) int64 which of them it is."""
    distinct = list(dict.fromkeys(prompts))
    return distinct, torch.tensor([distinct.index(prompt) for prompt in prompts], device="cpu")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InversionError(f"{path} is not a UTF-8 text file: save it as one") from error
