import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ClipTokenizer, ModelError
from models.glide_tokenizer import GlideTokenizer
from models.vocabulary import BYTE_TOKENS, Vocabulary, clip_vocabulary
from tests.tiny import tiny_glide_tokenizer, tiny_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
AWKWARD = [
    "", " ", "a", "An Oil PAINTING of a corgi", "don't we'll I'd they're i'm I've it's",
    "spaces \n\t and tabs", "naïve café ÀÉÎ ß İstanbul", "日本語 🐶🦮👩‍👩‍👧 mixed", "e\u0301 composed",
    "3.14159 + 2,000 = ??", "<frida> in <x>", "and_underscores-and-dashes!!!", "''s 's''",
    "&amp; &lt;b&gt;", "x" * 90, "\u200bzero\u00a0width", "½ ²³ Ⅷ ٣",
    "<|endoftext|> in a prompt", "a<|startoftext|>b",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return ClipTokenizer.clip()


@pytest.fixture(scope="module")
def peer(clip: ClipTokenizer, tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    clip.save(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_shipped_vocabulary_is_clips(clip: ClipTokenizer) -> None:
    assert (clip.vocab_size, clip.length, clip.begin, clip.end, clip.pad) == (49408, 77, 49406, 49407, 49407)


def test_ids_are_the_published_ones(clip: ClipTokenizer) -> None:
    for case in json.loads((FIXTURES / "tokenizer_clip.json").read_text(encoding="utf-8"))["cases"]:
        assert clip.encode([case["text"]]).ids[0].tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_agrees_with_transformers(clip: ClipTokenizer, peer, text: str) -> None:  # noqa: ANN001
    theirs = peer(text, padding="max_length", truncation=True, max_length=77)
    tokens = clip.encode([text])
    assert tokens.ids[0].tolist() == theirs["input_ids"]
    assert tokens.mask[0].long().tolist() == theirs["attention_mask"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_any_text_agrees_with_transformers(clip: ClipTokenizer, peer, text: str) -> None:  # noqa: ANN001
    assert clip.tokens_of(text) == peer(text, add_special_tokens=False)["input_ids"]


def test_padding_is_a_choice(clip: ClipTokenizer) -> None:
    two = ClipTokenizer(clip.vocabulary, pad=0)
    assert two.encode(["a"]).ids[0].tolist() == [49406, 320, 49407] + [0] * 74
    assert two.encode(["a"]).mask[0].tolist() == [True] * 3 + [False] * 74


def test_exclamation_mark_stays_a_word_where_it_pads(clip: ClipTokenizer) -> None:
    assert ClipTokenizer(clip.vocabulary, pad=0).tokens_of("hello!") == [3306, 256]


class TestPlaceholders:
    def ids(self, clip: ClipTokenizer, text: str, placeholders: dict[str, int]) -> list[int]:
        tokens = clip.encode([text], placeholders)
        return tokens.ids[0][tokens.mask[0]].tolist()[1:-1]

    def test_stand_where_the_word_stood(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "a <frida>, a dog", {"<frida>": 3}) == [
            320,
            49408,
            49409,
            49410,
            267,
            320,
            1929,
        ]

    def test_follow_each_other_in_the_mappings_order(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "<b> <a>", {"<a>": 2, "<b>": 3}) == [49410, 49411, 49412, 49408, 49409]

    def test_the_longest_wins(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "<dog>2 <dog>", {"<dog>": 1, "<dog>2": 1}) == [49409, 49408]

    def test_never_inside_a_word(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "cats concat cat", {"cat": 1}) == [*clip.tokens_of("cats concat"), 49408]
        assert self.ids(clip, "sks_dog sks-dog", {"sks": 1}) == [
            *clip.tokens_of("sks_dog"), 49408, *clip.tokens_of("-dog"),
        ]  # fmt: skip

    def test_case_counts(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "Sks sks", {"sks": 1}) == [*clip.tokens_of("Sks"), 49408]

    def test_may_hold_any_character(self, clip: ClipTokenizer) -> None:
        for name in ("*", "S*", "my dog", "(a|b)", "\\d+", "フリーダ", "<|x|>"):
            assert self.ids(clip, f"a {name} b", {name: 1}) == [320, 49408, 321], name

    def test_several_in_a_row(self, clip: ClipTokenizer) -> None:
        assert self.ids(clip, "<x><x> <x>", {"<x>": 1}) == [49408] * 3

    @pytest.mark.parametrize("bad", [{"": 1}, {" ": 1}, {"<x>": 0}])
    def test_must_have_a_name_and_a_vector(self, clip: ClipTokenizer, bad: dict[str, int]) -> None:
        with pytest.raises(ModelError, match="a name and at least one vector"):
            clip.encode(["a"], bad)

    def test_decode_names_them_once(self, clip: ClipTokenizer) -> None:
        assert clip.decode([320, 49408, 49409, 1929, 49410], {"<x>": 2, "<y>": 1}) == "a <x> dog <y>"


def test_what_does_not_fit_is_named(clip: ClipTokenizer) -> None:
    with pytest.warns(UserWarning, match=r"78 tokens is longer than the 75 that fit; cut off: '<x> is big'"):
        tokens = clip.encode(["dog " * 74 + "<x> is big", "short"], {"<x>": 2})
    assert tokens.cut == ["<x> is big", ""]
    assert tokens.ids[0, -2:].tolist() == [49408, 49407]


def test_what_just_fits_is_not_cut(clip: ClipTokenizer, recwarn: pytest.WarningsRecorder) -> None:
    tokens = clip.encode(["dog " * 75])
    assert tokens.mask.all()
    assert not recwarn.list
    assert tokens.cut == [""]


def test_words_that_exist(clip: ClipTokenizer) -> None:
    assert clip.is_word("dog")
    assert clip.is_word(" Dog ")
    assert not clip.is_word("<frida>")
    assert not clip.is_word("")


@pytest.mark.parametrize(("length", "pad"), [(2, None), (77, 49408), (77, -1)])
def test_impossible_settings_are_refused(clip: ClipTokenizer, length: int, pad: int | None) -> None:
    with pytest.raises(ModelError):
        ClipTokenizer(clip.vocabulary, length, pad)


CAPTIONS = ["a red dog", "the dog in the snow", "a blue cat in the snow, Twitter style", "猫 cat 🐩"] * 5


class TestOwnVocabulary:
    def test_is_laid_out_as_clips(self) -> None:
        own = ClipTokenizer.train(CAPTIONS, 530, 16)
        tokens = list(own.vocabulary.tokens)
        assert tokens[: BYTE_TOKENS - 2] == list(clip_vocabulary().tokens)[: BYTE_TOKENS - 2]
        assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
        assert (own.vocab_size, own.length, own.pad) == (530, 16, 529)

    def test_the_same_captions_teach_the_same_merges(self) -> None:
        # of 400 words of two letters each pair is as frequent as any other: their order alone decides
        captions = [f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
        learned = [ClipTokenizer.train(captions, 700).vocabulary.merges for _ in range(4)]
        assert learned[1:] == learned[:1] * 3

    def test_learns_the_common_words(self) -> None:
        own = ClipTokenizer.train(CAPTIONS, 600)
        assert all(own.is_word(word) for word in ("dog", "Cat", "snow", "猫", "the"))
        assert own.vocab_size < 600  # every word of these captions is one token before there are 600

    def test_takes_any_text(self) -> None:
        own = ClipTokenizer.train(CAPTIONS, 520)
        assert own.decode(own.tokens_of("zebra ÿ 🦓")) == "zebra ÿ 🦓"

    def test_transformers_reads_it_with_the_same_ids(self, tmp_path: Path) -> None:
        from transformers import CLIPTokenizer

        own = ClipTokenizer.train(CAPTIONS, 540, 16)
        own.save(tmp_path)
        peer = CLIPTokenizer.from_pretrained(tmp_path)
        for text in [*CAPTIONS, "zebra's", "<|endoftext|>", ""]:
            assert peer(text, padding="max_length")["input_ids"] == own.encode([text]).ids[0].tolist()

    def test_needs_room_for_the_bytes(self) -> None:
        with pytest.raises(ModelError, match="514"):
            ClipTokenizer.train(CAPTIONS, 513)


class TestFolders:
    def test_round_trip(self, tmp_path: Path) -> None:
        own = ClipTokenizer(ClipTokenizer.train(CAPTIONS, 540).vocabulary, 16, 0)
        own.save(tmp_path)
        read = ClipTokenizer.from_folder(tmp_path)
        assert (read.vocabulary, read.length, read.pad) == (own.vocabulary, 16, 0)

    def test_tokenizer_json_alone_is_enough(self, tmp_path: Path) -> None:
        from transformers import CLIPTokenizer

        own = ClipTokenizer.train(CAPTIONS, 540, 16)
        own.save(tmp_path / "a")
        CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        assert not (tmp_path / "b" / "vocab.json").exists()
        read = ClipTokenizer.from_folder(tmp_path / "b")
        assert (read.vocabulary, read.length, read.pad) == (own.vocabulary, 16, own.end)

    def test_the_special_tokens_map_wins_as_in_the_published_sd2(self, tmp_path: Path) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
        assert ClipTokenizer.from_folder(tmp_path).pad == 0

    def test_a_padding_token_that_there_is_not(self, tmp_path: Path) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
        with pytest.raises(ModelError, match="the padding token '<pad>' of .* is not in its vocabulary"):
            ClipTokenizer.from_folder(tmp_path)

    def test_lengths_that_were_never_set(self, tmp_path: Path) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(
            '{"model_max_length": 1000000000000000019884624838656}'
        )
        assert ClipTokenizer.from_folder(tmp_path).length == 77
        assert ClipTokenizer.from_folder(tmp_path, 20).length == 20
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": null}')
        assert ClipTokenizer.from_folder(tmp_path).length == 77

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"needs vocab\.json"):
            ClipTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("vocab", ['{"a": 0}', '{"<|startoftext|>": 0, "<|endoftext|>": 2}', "{"])
    def test_a_broken_vocabulary_is_refused(self, tmp_path: Path, vocab: str) -> None:
        (tmp_path / "vocab.json").write_text(vocab)
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(ModelError):
            ClipTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("special_tokens_map.json", {"pad_token": {"x": 5}}),
            ("special_tokens_map.json", {"pad_token": [5]}),
            ("tokenizer_config.json", {"model_max_length": "long"}),
            ("vocab.json", {"<|startoftext|>": "0", "<|endoftext|>": 1}),
            ("vocab.json", {"<|startoftext|>": [0], "<|endoftext|>": 1}),
        ],
    )
    def test_settings_of_wrong_kinds_are_refused(self, tmp_path: Path, name: str, content: dict) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ModelError):
            ClipTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("model", [[1], {}, {"vocab": {}, "merges": 5}, {"vocab": 3, "merges": []}])
    def test_a_tokenizer_json_without_a_vocabulary_is_refused(self, tmp_path: Path, model: object) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(ModelError, match=r"tokenizer\.json has no vocabulary with its merges"):
            ClipTokenizer.from_folder(tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}, "merges": [5]}}))
        with pytest.raises(ModelError, match="a merge joins two tokens; found 5"):
            ClipTokenizer.from_folder(tmp_path)

    def test_merges_that_are_no_text(self, tmp_path: Path) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n\xff \xfe\n")
        with pytest.raises(ModelError, match=r"merges\.txt is no text in UTF-8"):
            ClipTokenizer.from_folder(tmp_path)

    def test_a_merge_joins_two(self, tmp_path: Path) -> None:
        ClipTokenizer.train(CAPTIONS, 540, 16).save(tmp_path)
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
        with pytest.raises(ModelError, match="a b c"):
            ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("second", [0, 2])      # twice, and a gap: its end would be a learned word's first id
def test_a_vocabulary_has_each_id_once(second: int) -> None:
    with pytest.raises(ModelError, match="each once"):
        Vocabulary({"<|startoftext|>": 0, "<|endoftext|>": second}, [])


def test_a_byte_that_a_vocabulary_lacks_is_read_as_the_end_token_as_transformers_does(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    small = ClipTokenizer(Vocabulary({"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, []), 8)
    small.save(tmp_path)
    expected = CLIPTokenizer.from_pretrained(tmp_path)("a b a", padding="max_length", max_length=8).input_ids
    assert small.encode(["a b a"]).ids[0].tolist() == expected


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_glide_tokenizer()])
def test_a_text_that_is_in_no_list(tokenizer: ClipTokenizer | GlideTokenizer) -> None:
    """It was as many prompts as it has characters, and one image was told all of them."""
    with pytest.raises(ModelError, match=r"prompts are a list of texts: put 'a dog' in brackets"):
        tokenizer.encode("a dog")
