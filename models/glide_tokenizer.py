"""GLIDE's byte-pair tokenizer: GPT-2's merges over lower-cased text, with placeholders expanded on ids.

Unlike CLIP's, it knows no begin and no end: a prompt is its tokens, then end tokens up to the full length, and the mask
is False where there is no text. The empty prompt is all padding. A space belongs to the word after it, " dog" being
another token than "dog", so a placeholder swallows the one space before it, as a word would. A placeholder's ids begin
at `vocab_size`; no existing id moves for it, the padding's (the last of the vocabulary) least of all.

Source: Radford et al. 2019 (GPT-2), section 2.2; openai/glide-text2im @ 69b5307, tokenizer/bpe.py.
"""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.errors import ModelError
from models.tokenizer import Tokens, by_owner, expanded, fitted, padded
from models.vocabulary import byte_characters, merges_of, read_merges

END = "<|endoftext|>"
BYTES_AND_END = 257
GPT2_MERGES = Path(__file__).parent / "data" / "gpt2" / "vocab.bpe.gz"


class GlideTokenizer:
    """GLIDE's tokenizer over merges, (pair, pair) first merged first.

    length: tokens in a sequence. Raises ModelError for a length below 1.
    """

    def __init__(self, merges: Iterable[tuple[str, str]], length: int = 128) -> None:
        if length < 1:
            raise ModelError(f"{length} tokens are no sequence: use 1 or more")
        self.merges, self.length = list(merges), length
        tokens = [*byte_characters(), *(a + b for a, b in self.merges), END]
        self.vocab_size, self.end = len(tokens), len(tokens) - 1
        self._encoder = _encoder({token: i for i, token in enumerate(tokens)}, self.merges)

    @classmethod
    def gpt2(cls, length: int = 128) -> "GlideTokenizer":
        """GPT-2's 50,257 tokens, which ship with this package."""
        with gzip.open(GPT2_MERGES, "rt", encoding="utf-8") as lines:
            return cls(read_merges(lines), length)

    @property
    def room(self) -> int:
        """Tokens of a text that fit a sequence: no begin, no end."""
        return self.length

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, length: int = 128) -> "GlideTokenizer":
        """A tokenizer of at most vocab_size tokens (257 or more) learned from captions; it can encode every text.

        Raises ModelError for fewer, and for a length below 1.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        if vocab_size < BYTES_AND_END:
            raise ModelError(f"{vocab_size} tokens have no room for the {BYTES_AND_END} that are no merges: use more")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
        bpe.train_from_iterator((caption.lower() for caption in captions), trainer)
        return cls(merges_of(bpe)[: vocab_size - BYTES_AND_END], length)

    def tokens_of(self, text: str) -> list[int]:
        """The ids of a text as it stands inside a sentence, behind a space; without padding or placeholders."""
        return self._ids(" " + text.strip()) if text.strip() else []

    def is_word(self, text: str) -> bool:
        """Whether the text is one existing token, so that a placeholder of this name would shadow a word."""
        return 1 in (len(self.tokens_of(text)), len(self._ids(text)))

    def decode(self, ids: Sequence[int], placeholders: Mapping[str, int] | None = None) -> str:
        """The text of ids; a run of ids of one placeholder gives its name once."""
        texts = []
        for owner, run in by_owner(ids, placeholders or {}, self.vocab_size):
            texts.append(self._encoder.decode(run, skip_special_tokens=False) if owner is None else " " + owner)
        return "".join(texts)

    def encode(self, texts: Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tokens:
        """Prompts to ids at full length; arguments and cutting as in `ClipTokenizer.encode`."""
        placeholders = dict(placeholders or {})
        rows = expanded(texts, placeholders, self.vocab_size, self._ids)
        rows, cut = fitted(rows, self.room, lambda ids: self.decode(ids, placeholders))
        return padded(rows, self.length, self.end, cut)

    def _ids(self, text: str) -> list[int]:
        return self._encoder.encode(text.lower(), add_special_tokens=False).ids


def _encoder(tokens: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A `tokenizers.Tokenizer` that cuts text by GPT-2's pattern and merges bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    encoder = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    encoder.decoder = decoders.ByteLevel()
    return encoder
