"""CLIP's vocabulary: where it comes from, how it is read and written, and how a smaller one is learned.

A vocabulary follows from its merges: the 256 byte characters, the same 256 with the word-end mark `</w>`, one
entry a merge, then the begin and the end token. CLIP's own has 48,894 merges and so 49,408 entries; it ships
with this package as OpenCLIP publishes it (see NOTICE).

Source: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in Radford et al. 2021 (arXiv:2103.00020).
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from models.errors import ModelError
from models.files import read_json

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_MERGES = Path(__file__).parent / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_MERGE_COUNT = 49152 - 256 - 2
BYTE_TOKENS = 514  # every byte, alone and as a word's last, begin and end: all that is not a merge
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Vocabulary:
    """tokens: token to id, ids 0 to N-1 each once, begin and end among them; merges: pairs, first merged first.

    Raises ModelError for tokens that are not such a mapping.
    """

    tokens: dict[str, int]
    merges: list[tuple[str, str]]

    def __post_init__(self) -> None:
        ids = list(self.tokens.values())
        if not all(isinstance(i, int) for i in ids) or sorted(ids) != list(range(len(ids))):
            raise ModelError(f"a vocabulary of {len(self.tokens)} tokens needs the ids from 0 up, each once")
        if BEGIN not in self.tokens or END not in self.tokens:
            raise ModelError(f"the vocabulary has no {BEGIN} or no {END}: it is not a CLIP vocabulary")


def from_merges(merges: Iterable[tuple[str, str]]) -> Vocabulary:
    """The vocabulary that follows from merges, in CLIP's order."""
    characters, merges = list(byte_characters()), list(merges)
    tokens = [*characters, *(c + WORD_END for c in characters), *(a + b for a, b in merges), BEGIN, END]
    return Vocabulary({token: i for i, token in enumerate(tokens)}, merges)


def clip_vocabulary() -> Vocabulary:
    """The 49,408 tokens of CLIP and OpenCLIP."""
    with gzip.open(CLIP_MERGES, "rt", encoding="utf-8") as lines:
        return from_merges(read_merges(islice(lines, CLIP_MERGE_COUNT + 1)))


def learn(captions: Iterable[str], size: int) -> Vocabulary:
    """Learn merges from captions: at most `size` tokens; fewer when every word has been merged to one token.

    Raises ModelError below the 514 tokens that are not merges.
    """
    if size < BYTE_TOKENS:
        raise ModelError(f"{size} tokens have no room for the {BYTE_TOKENS} that are not merges: use more")
    from tokenizers import trainers

    bpe = byte_pair_encoder(Vocabulary({BEGIN: 0, END: 1}, []))
    # Pairs that are equally frequent are merged in the order of their parts' ids. The trainer would give the word-end
    # characters theirs as it meets them, in an order that differs from run to run; named here, they have one.
    ends = [character + WORD_END for character in byte_characters()]
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix=WORD_END, special_tokens=ends, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    # The trainer counts only the bytes that it met, so it may learn more merges than there is room for; a
    # merge needs earlier ones only, so the list can be cut anywhere.
    return from_merges(merges_of(bpe)[: size - BYTE_TOKENS])


def merges_of(bpe: Any) -> list[tuple[str, str]]:
    """What a `tokenizers.Tokenizer` has learned to merge, first merged first."""
    return [_pair(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]


def read(folder: Path) -> tuple[Vocabulary, dict[str, Any]]:
    """A tokenizer folder of the diffusers layout: its vocabulary and its settings.

    The vocabulary is vocab.json with merges.txt, or else tokenizer.json; the settings are tokenizer_config.json
    overlaid with special_tokens_map.json, as transformers overlays them. Raises ModelError naming what is missing.
    """
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokens = read_json(folder / "vocab.json")
        try:
            merges = read_merges((folder / "merges.txt").read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError as error:
            raise ModelError(f"{folder / 'merges.txt'} is no text in UTF-8: fetch it anew") from error
    elif (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model")
        tokens, pairs = (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
        if not isinstance(tokens, dict) or not isinstance(pairs, list):
            raise ModelError(f"{folder / 'tokenizer.json'} has no vocabulary with its merges: fetch it anew")
        merges = [_pair(merge) for merge in pairs]
    else:
        raise ModelError(f"{folder} holds no tokenizer: it needs vocab.json and merges.txt, or tokenizer.json")
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    return Vocabulary(tokens, merges), settings


def write(folder: Path, vocabulary: Vocabulary, length: int, pad: str) -> None:
    """Write vocab.json, merges.txt and the settings, in the form that transformers' CLIPTokenizer reads."""
    names = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges), ""]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary.tokens)
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings | names)
    _write_json(folder / "special_tokens_map.json", names)


def byte_pair_encoder(vocabulary: Vocabulary) -> Any:
    """A `tokenizers.Tokenizer` that composes (NFC), lower-cases, cuts text by CLIP's pattern and merges bytes.

    Raises ModelError for merges of what the vocabulary does not hold.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        merges = models.BPE(
            vocab=vocabulary.tokens, merges=vocabulary.merges, end_of_word_suffix=WORD_END, unk_token=END
        )
    except Exception as error:  # what the library raises has no type of its own
        raise ModelError(f"the vocabulary and its merges do not fit each other ({error})") from error
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder = Tokenizer(merges)
    encoder.normalizer = normalizers.Sequence(clean)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([BEGIN, END])
    return encoder


def byte_characters() -> Iterator[str]:
    """One printable character a byte, in CLIP's order: the printable bytes as themselves, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


def read_merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Merges from lines of two words, after a first line that holds the version."""
    return [_pair(line) for i, line in enumerate(lines) if i > 0 and line.strip()]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    pair = merge.split() if isinstance(merge, str) else merge
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ModelError(f"a merge joins two tokens; found {merge!r}")
    return pair[0], pair[1]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
