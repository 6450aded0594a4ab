import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from inversion import TEMPLATES, Concept, InversionError, check_prompts, read_templates, templates_for
from inversion.prompts import unique_prompts
from models import ClipTokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return tiny_tokenizer()


def concept(n: int = 1, placeholder: str = "<x>") -> Concept:
    return Concept(placeholder, torch.zeros(n, 4))


@pytest.mark.parametrize("name", ["object", "style", "emoji"])
def test_sets_are_distinct_and_fit_clip_with_room_for_many_vectors(name: str) -> None:
    templates = read_templates(name)
    assert len(set(templates)) == len(templates)
    check_prompts(ClipTokenizer.clip(), concept(32), [templates])


def test_object_and_style_have_about_twenty() -> None:
    assert len(TEMPLATES["object"]) == len(TEMPLATES["style"]) == 20


def test_a_template_file_is_read_by_lines(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\ufeffa photo of {}\n\n  {} at sea \n", encoding="utf-8")
    assert read_templates(str(tmp_path / "t.txt")) == ["a photo of {}", "{} at sea"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no template"),
        (b"a photo of {}\na photo\n", r"'a photo' in .* has no \{\}: the word would have no effect"),
        (b"\xff\xfe{}", "not a UTF-8 text file"),
    ],
)
def test_template_files_that_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(text)
    with pytest.raises(InversionError, match=message):
        read_templates(str(tmp_path / "t.txt"))


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(InversionError, match="no templates are called 'objects'.*use object, style, emoji"):
        read_templates("objects")


def test_a_caption_replaces_the_templates_of_its_image_alone(tmp_path: Path) -> None:
    files = [tmp_path / "1.jpg", tmp_path / "2.jpg", tmp_path / "3.jpg"]
    (tmp_path / "2.txt").write_text("a picture of <frida> on her pillow\n under a bicycle\n")
    (tmp_path / "3.txt").write_text("{} sleeps")
    for named in (files, [str(file) for file in files]):
        assert templates_for(named, ["a {}", "one {}"], "<frida>") == [
            ["a {}", "one {}"],
            ["a picture of {} on her pillow under a bicycle"],
            ["{} sleeps"],
        ]


def test_templates_are_no_single_line() -> None:
    with pytest.raises(InversionError, match=r"a list of lines: put 'a \{\}' in brackets"):
        templates_for(["1.jpg"], "a {}", "<frida>")


def test_a_caption_without_the_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("a dog on her pillow")
    with pytest.raises(InversionError, match=r"1\.txt does not contain <frida>.*no effect"):
        templates_for([tmp_path / "1.jpg"], ["{}"], "<frida>")


def test_what_fits_exactly_passes_and_one_more_does_not(tokenizer: ClipTokenizer) -> None:
    """24 tokens hold begin, end and 22 more: "a photo of" takes 3, so 19 vectors fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is cut
        check_prompts(tokenizer, concept(19), [["a {}", "a photo of {}"]])
    with pytest.raises(
        InversionError, match=r"20 vectors and the 3 tokens of .* the 22 that fit.*at most 19 vectors"
    ):
        check_prompts(tokenizer, concept(20), [["a {}", "a photo of {}"]])


def test_every_slot_counts(tokenizer: ClipTokenizer) -> None:
    check_prompts(tokenizer, concept(11), [["{} {}"]])
    with pytest.raises(InversionError, match="at most 11 vectors, or"):
        check_prompts(tokenizer, concept(12), [["{} {}"]])
    with pytest.raises(InversionError, match="2 vectors and the 0 tokens.*at most 1 vector, or"):
        check_prompts(tokenizer, concept(2), [["{}" + 14 * " {}"]])


def test_a_template_that_is_too_long_alone_is_refused(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(InversionError, match="1 vector and the 22 tokens.*please shorten the template"):
        check_prompts(tokenizer, concept(1), [["a " * 22 + "{}"]])


@pytest.mark.parametrize(
    ("placeholder", "template"),
    [("<x>", "a photo"), ("frida", "a photo of my{}"), ("frida", "a photo of {}s"), ("frida", "{}, and my{}")],
)
def test_a_word_without_effect_in_a_template_is_refused(
    tokenizer: ClipTokenizer, placeholder: str, template: str
) -> None:
    with pytest.raises(InversionError, match="has no effect in the template"):
        check_prompts(tokenizer, concept(2, placeholder), [["a {}"], [template]])


def test_a_word_that_exists_is_refused(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(InversionError, match="already a word"):
        check_prompts(tokenizer, concept(1, "dog"), [["a {}"]])


def test_a_caption_names_the_word_where_a_tokenizer_sees_it(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("fridas of frida")
    found = templates_for([tmp_path / "1.jpg"], ["{}"], "frida")
    assert found == [["fridas of {}"]]
    check_prompts(tokenizer, concept(1, "frida"), found)
    (tmp_path / "1.txt").write_text("fridas")
    with pytest.raises(InversionError, match="does not contain frida, so the word would have no effect"):
        templates_for([tmp_path / "1.jpg"], ["{}"], "frida")


@pytest.mark.parametrize("templates", [[], [[]], [["{}"], []]])
def test_an_image_without_templates_is_refused(tokenizer: ClipTokenizer, templates: list[list[str]]) -> None:
    with pytest.raises(InversionError, match="no template to learn in"):
        check_prompts(tokenizer, concept(), templates)


@pytest.mark.parametrize("templates", [["a {}"], [["a {}"], "a {}"], "a {}"])
def test_a_line_is_no_list_of_lines(tokenizer: ClipTokenizer, templates: Sequence[Sequence[str]]) -> None:
    with pytest.raises(InversionError, match="lists of lines, one for every image, and one is the line 'a"):
        check_prompts(tokenizer, concept(), templates)


def test_unique_prompts_keep_order_and_point_back() -> None:
    distinct, which = unique_prompts(["b", "a", "b"])
    assert distinct == ["b", "a"]
    assert which.tolist() == [0, 1, 0]
