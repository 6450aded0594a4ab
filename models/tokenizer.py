"""CLIP's byte-pair tokenizer, with placeholders expanded on ids.

Text is composed, its white space collapsed, lower-cased, and cut into words by CLIP's pattern: English
contractions, runs of letters, single digits, runs of anything else. A word becomes its UTF-8 bytes, the last
one marked as a word's end; then pairs are merged in the order of the merge list until none is left. Every
sequence is `begin, tokens, end, padding` at full length.

A placeholder (a learned word) never passes through the merges: where its exact string stands in a prompt, its
n ids are put, `vocab_size` and upwards, and the text transformer reads those from the learned vectors instead
of from its table. So it cannot be split, it cannot corrupt a neighbour, and no table is resized.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch import Tensor

from models import vocabulary
from models.errors import ModelError
from models.files import as_path
from models.vocabulary import BEGIN, END, WORD_END, Vocabulary

NEVER_SET = 1_000_000  # transformers writes 1e30 where a length was never set


@dataclass(frozen=True)
class Tokens:
    """Prompts as the text transformer reads them.

    ids: (B, L) int64, full length; mask: (B, L) bool, True where there is a prompt: of CLIP from the begin to the end
    token; cut: for each prompt the text that did not fit, "" where everything did.
    """

    ids: Tensor
    mask: Tensor
    cut: list[str]


class ClipTokenizer:
    """CLIP's tokenizer over a vocabulary.

    length: tokens in a sequence, begin and end included. pad: the id after the end token; the end token itself if None,
    as in Stable Diffusion 1.x (2.x fills with 0). Raises ModelError for a length or a pad that cannot be.

    A "!" stays the token that CLIP has for it, also where a folder names "!" as its padding: transformers
    would then read every "!" of a prompt as padding, which the SD 2.x encoder never met in its training.
    """

    def __init__(self, vocab: Vocabulary, length: int = 77, pad: int | None = None) -> None:
        if length < 3:
            raise ModelError(f"{length} tokens leave no room between begin and end: use 3 or more")
        self.vocabulary, self.vocab_size, self.length = vocab, len(vocab.tokens), length
        self.begin, self.end = vocab.tokens[BEGIN], vocab.tokens[END]
        self.pad = self.end if pad is None else pad
        if not 0 <= self.pad < self.vocab_size:
            raise ModelError(f"the padding id {self.pad} is outside the vocabulary of {self.vocab_size}")
        self._encoder = vocabulary.byte_pair_encoder(vocab)

    @classmethod
    def clip(cls, length: int = 77, pad: int | None = None) -> "ClipTokenizer":
        """The vocabulary of CLIP and OpenCLIP, which ships with this package (49,408 tokens)."""
        return cls(vocabulary.clip_vocabulary(), length, pad)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, length: int = 77) -> "ClipTokenizer":
        """A tokenizer of at most vocab_size tokens (514 or more) learned from captions; it can encode every text.

        Raises ModelError for fewer, and for a length below 3.
        """
        return cls(vocabulary.learn(captions, vocab_size), length)

    @classmethod
    def from_folder(cls, folder: str | Path, length: int | None = None) -> "ClipTokenizer":
        """Read a tokenizer folder of the diffusers layout.

        length: over what the folder says; 77 where neither does. Padded with the end token unless the folder
        names another. Raises ModelError for a folder that holds no CLIP vocabulary.
        """
        vocab, settings = vocabulary.read(as_path(folder))
        token = settings.get("pad_token") or END
        pad = token.get("content") if isinstance(token, dict) else token
        if not isinstance(pad, str) or pad not in vocab.tokens:
            raise ModelError(f"the padding token {pad!r} of {folder} is not in its vocabulary")
        stated = length or settings.get("model_max_length") or NEVER_SET
        if not isinstance(stated, int | float):
            raise ModelError(f"the model_max_length of {folder} is a number of tokens, not {stated!r}")
        return cls(vocab, 77 if stated >= NEVER_SET else int(stated), vocab.tokens[pad])

    def save(self, folder: str | Path) -> None:
        """Write a folder that `from_folder` and transformers' CLIPTokenizer read with the same ids."""
        pad = next(token for token, i in self.vocabulary.tokens.items() if i == self.pad)
        vocabulary.write(as_path(folder), self.vocabulary, self.length, pad)

    @property
    def room(self) -> int:
        """Tokens of a text that fit a sequence."""
        return self.length - 2

    def tokens_of(self, text: str) -> list[int]:
        """The ids of a text, without begin, end, padding or placeholders."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def is_word(self, text: str) -> bool:
        """Whether the text is one existing token, so that a placeholder of this name would shadow a word."""
        return len(self.tokens_of(text)) == 1

    def decode(self, ids: Sequence[int], placeholders: Mapping[str, int] | None = None) -> str:
        """The text of ids, lower-case; a run of ids of one placeholder gives its name once."""
        words = []
        for owner, run in by_owner(ids, placeholders or {}, self.vocab_size):
            plain = self._encoder.decode(run, skip_special_tokens=False) if owner is None else owner
            words.append(plain.replace(WORD_END, " ").strip())
        return " ".join(words)

    def encode(self, texts: Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tokens:
        """Prompts to ids at full length.

        placeholders: exact word -> its number of vectors; their ids follow each other from vocab_size on in
        the mapping's order. A longer placeholder is preferred to a shorter one, and none is seen inside a
        word. What does not fit is cut before the end token, with a UserWarning that quotes it. Raises ModelError for a
        text that is not in a list.
        """
        placeholders = dict(placeholders or {})
        rows = expanded(texts, placeholders, self.vocab_size, self.tokens_of)
        rows, cut = fitted(rows, self.room, lambda ids: self.decode(ids, placeholders))
        return padded([[self.begin, *row, self.end] for row in rows], self.length, self.pad, cut)


def expanded(
    texts: Sequence[str], placeholders: Mapping[str, int], vocab_size: int, ids_of: Callable[[str], list[int]]
) -> list[list[int]]:
    """The ids of texts: what stands between placeholders by `ids_of`, each placeholder as its own, from vocab_size on.

    A space before a placeholder is not handed to `ids_of`: it would be one before nothing. Raises ModelError for one
    text that is in no list, every character of which would be a prompt.
    """
    if isinstance(texts, str):
        raise ModelError(f"prompts are a list of texts: put {texts!r} in brackets")
    starts = accumulate(placeholders.values(), initial=vocab_size)
    known = {name: range(start, start + placeholders[name]) for name, start in zip(placeholders, starts)}
    pattern = placeholder_pattern(placeholders)
    rows = []
    for text in texts:
        parts = pattern.split(text) if pattern else [text]
        followed = [part.removesuffix(" ") if after in known else part for part, after in zip(parts, [*parts[1:], ""])]
        rows.append([token for part in followed for token in known.get(part) or ids_of(part)])
    return rows


def by_owner(
    ids: Sequence[int], placeholders: Mapping[str, int], vocab_size: int
) -> Iterator[tuple[str | None, list[int]]]:
    """Runs of ids, each with the placeholder whose they are; None for words of the vocabulary."""
    owners = [name for name, count in placeholders.items() for _ in range(count)]
    runs = groupby(ids, lambda i: owners[i - vocab_size] if i >= vocab_size else None)
    return ((owner, list(run)) for owner, run in runs)


def fitted(rows: list[list[int]], room: int, text_of: Callable[[list[int]], str]) -> tuple[list[list[int]], list[str]]:
    """Rows of at most `room` ids, and for each the text that was cut off, with a UserWarning that quotes it."""
    cut = [text_of(row[room:]) for row in rows]
    for row, lost in zip(rows, cut):
        if len(row) > room:
            too_long = f"a prompt of {len(row)} tokens is longer than the {room} that fit"
            warnings.warn(f"{too_long}; cut off: {lost!r}", UserWarning, stacklevel=3)
    return [row[:room] for row in rows], cut


def padded(rows: list[list[int]], length: int, pad: int, cut: list[str]) -> Tokens:
    """Rows at full length, with their mask."""
    ids = torch.full((len(rows), length), pad, dtype=torch.int64, device="cpu")                              # (B, L)
    mask = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")                                            # (B, L)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu"), True
    return Tokens(ids, mask, cut)


def placeholder_pattern(placeholders: Mapping[str, int]) -> re.Pattern[str] | None:
    """What splits a prompt at its placeholders: the longest first, and none within a word.

    Raises ModelError for one without a name, or of no vectors.
    """
    for name, count in placeholders.items():
        if not name.strip() or count < 1:
            raise ModelError(f"a placeholder needs a name and at least one vector; got {name!r} with {count}")
    names = sorted(placeholders, key=len, reverse=True)
    before = {name: r"(?<!\w)" if re.match(r"\w", name) else "" for name in names}
    after = {name: r"(?!\w)" if re.search(r"\w\Z", name) else "" for name in names}
    whole = [before[name] + re.escape(name) + after[name] for name in names]
    return re.compile("(" + "|".join(whole) + ")") if whole else None
