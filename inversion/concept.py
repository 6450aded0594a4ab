"""A learned word: a placeholder, and the n vectors that stand for it in front of the text transformer.

Textual inversion (Gal et al. 2022, arXiv:2208.01618) looks for vectors v* that a frozen model understands as
a new word. They start as the table's vectors of known words. Other tools have four incompatible rules for
turning a phrase into n vectors; here is one, and the file's metadata says which case it was:

    no n given     one vector a token of the phrase
    n given        the tokens in turn, v_i = table[tok[i mod len]] ("n copies" for a single token);
                   a phrase longer than n is refused, because a part of it would be lost in silence
"""

from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inversion.errors import InversionError
from inversion.formats import read_embeddings, write_embedding
from models.files import as_path

FAMILY_OF_WIDTH = {512: "GLIDE", 768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
FAMILIES = {"glide": "GLIDE", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}


@dataclass
class Concept:
    """placeholder: the new word as it stands in prompts. vectors: (n, D) float32. metadata: what the file says of it.

    Raises InversionError for a placeholder that is not one word, or holds a template's slot, and for vectors that are
    no tensor, not finite or not (n, D) with n >= 1.
    """

    placeholder: str
    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_word = isinstance(self.placeholder, str) and self.placeholder.split() == [self.placeholder]
        if not one_word or "{}" in self.placeholder:
            raise InversionError(
                f"{self.placeholder!r} cannot be a placeholder: use one word without spaces, like '<frida>'"
            )
        if not isinstance(self.vectors, Tensor):
            raise InversionError(
                f"the vectors of {self.placeholder} must be a tensor (n, D), not a {type(self.vectors).__name__}: "
                "make it one by torch.as_tensor"
            )
        if self.vectors.ndim != 2 or not self.vectors.numel() or not self.vectors.isfinite().all():
            raise InversionError(
                f"the vectors of {self.placeholder} must be finite and (n, D): {tuple(self.vectors.shape)}"
            )
        self.vectors = self.vectors.float()

    @classmethod
    def from_text(cls, model: Any, placeholder: str, text: str, n: int | None = None) -> "Concept":
        """Start from the vectors of a word or a phrase.

        model: anything with `tokenizer.tokens_of(text)`, `tokenizer.is_word(text)`, `embedding(id) -> (D,)`, `family`
        and `source`. n: how many vectors; None takes one a token. Raises InversionError if the model reads no text, the
        placeholder is already a word, the text is none or has no tokens, or more than n, or n is below 1.
        """
        if not hasattr(model.tokenizer, "tokens_of"):
            raise InversionError(f"{model.source} is told classes and reads no words: take one that draws from text")
        if not isinstance(text, str):
            raise InversionError(f"a concept starts from a text, such as 'dog', not from {text!r}")
        if not isinstance(n, Integral | None):
            raise InversionError(f"the number of vectors is a whole one, or None, not {n!r}")
        require_new_word(model.tokenizer, placeholder)
        ids = model.tokenizer.tokens_of(text)
        if not ids:
            raise InversionError(f"the initial text {text!r} has no tokens: give a word such as 'dog'")
        if n is not None and n < 1:
            raise InversionError(f"a concept needs at least one vector, not {n}")
        if n is not None and len(ids) > n:
            raise InversionError(
                f"{text!r} has {len(ids)} tokens and does not fit {n} vector{'s' * (n > 1)}: "
                f"use at least {len(ids)}, leave the number out, or shorten the text"
            )
        count = len(ids) if n is None else n
        vectors = torch.stack([model.embedding(ids[i % len(ids)]) for i in range(count)])  # (n, D)
        tokens = f"{len(ids)} token{'s' * (len(ids) > 1)}"
        rule = "one vector a token" if count == len(ids) else f"{tokens} cycled to {count} vectors"
        metadata = {"init": text, "init_rule": rule, "family": model.family, "source": model.source}
        return cls(placeholder, vectors.detach().float().cpu(), metadata)

    @classmethod
    def load(
        cls, path: str | Path, width: int | None = None, placeholder: str | None = None, family: str | None = None
    ) -> "Concept":
        """Read a file of any format in `formats`.

        width, family: the model's, if it is known which one that is. placeholder: which word, where the file
        holds several; otherwise what to call it instead of its own name. Raises InversionError, naming what was
        found and what would do.
        """
        words, metadata = read_embeddings(as_path(path))
        if len(words) > 1 and placeholder not in words:
            listed = ", ".join(list(words)[:8])
            other = "" if placeholder is None else f", and {placeholder} is none of them"
            raise InversionError(f"{path} holds {len(words)} words ({listed}){other}: say which one, by placeholder=")
        vectors = words[placeholder] if placeholder in words else next(iter(words.values()))
        name = placeholder or next(iter(words))
        if name.split() != [name]:
            raise InversionError(
                f"the word of {path} would be called {name!r}, which cannot stand in a prompt: give it another name, "
                "by placeholder= or, on the command line, WORD=FILE"
            )
        concept = cls(name, vectors, metadata)
        if width is not None:
            concept.require_fit(width, family, str(path))
        return concept

    def require_fit(self, width: int, family: str | None = None, where: str = "") -> None:
        """Raise InversionError, naming both widths and families, unless the vectors are a model's.

        width, family: the model's; one of classes, which reads no words, has width 0. Vectors that do not say which
        family they were learned with are judged by width.
        """
        found, theirs = self.vectors.shape[1], self.metadata.get("family")
        if found == width and (theirs in (None, family) or family is None):
            return
        theirs = FAMILIES.get(theirs, theirs) or FAMILY_OF_WIDTH.get(found, "another model")
        if not width:
            raise InversionError(
                f"{self.placeholder}{f' in {where}' if where else ''} is a word, and this model is told classes and "
                "reads no words: leave it out, or name the model that it was learned with"
            )
        wanted = FAMILIES.get(family, family) or FAMILY_OF_WIDTH.get(width, "a model of another family")
        has, needs = ("", "") if found == width else (f" and has vectors of width {found}", f" and needs {width}")
        raise InversionError(
            f"{self.placeholder}{f' in {where}' if where else ''} was learned with {theirs}{has}; this model is "
            f"{wanted}{needs}: use the family that it was learned with"
        )

    def save(self, path: str | Path) -> None:
        """Write a one-key safetensors file {placeholder: (n, D) float32}; the rest goes into its metadata.

        Raises InversionError for a path that ends as a pickle's does.
        """
        write_embedding(as_path(path), self.placeholder, self.vectors, self.metadata)


def require_new_word(tokenizer: Any, placeholder: str) -> None:
    """Raise InversionError if the placeholder is one existing token."""
    if tokenizer.is_word(placeholder):
        inside = f"<{placeholder.strip('<|>')}>"
        other = inside if not tokenizer.is_word(inside) else "<frida>"
        raise InversionError(
            f"{placeholder!r} is already a word of the tokenizer and would lose its meaning: use a new one, such as "
            f"{other!r}"
        )
