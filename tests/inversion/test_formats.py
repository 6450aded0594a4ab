"""Files of every tool, from the reference cases (see tests/fixtures/embeddings/README.json)."""

import base64
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from inversion import Concept, InversionError
from inversion.formats import read_embeddings

FILES = Path(__file__).parents[1] / "fixtures" / "embeddings"
EXPECTED = load_file(FILES / "expected_vectors.safetensors")["vectors"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("diffusers.safetensors", "<frida>"),
        ("diffusers.bin", "<frida>"),
        ("a1111.pt", "frida-dog"),
        ("a1111_legacy_container.pt", "frida-dog"),
        ("kohya.safetensors", "kohya"),
        ("rinongal_embeddings.pt", "rinongal_embeddings"),
    ],
)
def test_every_format_gives_the_same_vectors(name: str, word: str) -> None:
    concept = Concept.load(FILES / name, width=768)
    assert concept.placeholder == word
    assert torch.equal(concept.vectors, EXPECTED)
    assert not concept.vectors.requires_grad


def test_half_precision_is_read_as_float32() -> None:
    words, _ = read_embeddings(FILES / "kohya_fp16.pt")
    vectors = words["kohya_fp16"]
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, EXPECTED.half().float())


def test_a_loaded_word_does_not_change_with_its_file(tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    Concept("<a>", torch.ones(2, 768)).save(file)
    Concept("<a>", torch.zeros(2, 768)).save(other)
    loaded = Concept.load(file)
    with open(file, "r+b") as written:                      # as `cp` does, in place
        written.write(other.read_bytes())
    assert torch.equal(loaded.vectors, torch.ones(2, 768))


def test_one_flat_vector_is_one_row() -> None:
    assert torch.equal(Concept.load(FILES / "diffusers_one_vector_1d.bin").vectors, EXPECTED[:1])


def test_what_a1111_says_of_itself_is_kept() -> None:
    metadata = Concept.load(FILES / "a1111.pt").metadata
    assert metadata == {"steps": "499", "source": "v1-5-pruned-emaonly"}


def test_what_a1111_leaves_open_is_not_said(tmp_path: Path) -> None:
    """A file that was not trained there has no checkpoint; and a name that is no text is none."""
    content = {"string_to_param": {"*": torch.ones(1, 8)}, "step": 0, "sd_checkpoint_name": None}
    for name in (None, "", 5):
        torch.save(content | {"name": name}, tmp_path / "frida.pt")
        concept = Concept.load(tmp_path / "frida.pt")
        assert (concept.placeholder, concept.metadata) == ("frida", {"steps": "0"})


def save_png(file: Path, text: str | None) -> None:
    """A picture as AUTOMATIC1111 writes it, its text before the pixels."""
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def encoded(content: object) -> str:
    return base64.b64encode(json.dumps(content).encode()).decode()


def test_a_picture_of_a1111_carries_a_word(tmp_path: Path) -> None:
    content = torch.load(FILES / "a1111.pt")
    content["string_to_param"] = {"*": {"TORCHTENSOR": content["string_to_param"]["*"].tolist()}}
    save_png(tmp_path / "frida-499.png", encoded(content))
    concept, same = Concept.load(tmp_path / "frida-499.png", width=768), Concept.load(FILES / "a1111.pt")
    assert torch.equal(concept.vectors, EXPECTED)
    assert (concept.placeholder, concept.metadata) == (same.placeholder, same.metadata)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "a picture without an embedding"),
        ("not base64", "damaged or cut short"),
        (base64.b64encode(b"no JSON").decode(), "damaged or cut short"),
        (encoded({"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}}), "damaged or cut short"),
        (encoded({"string_to_param": {"*": {"TORCHTENSOR": [[1.0, None]]}}}), "damaged or cut short"),
        (encoded({"string_to_param": {"*": [[1.0]]}}), "'picture' is a list, not vectors"),
        (encoded([1]), "holds no learned embedding: a list was found"),
        (encoded({"string_to_param": {"*": {"TORCHTENSOR": [[float("nan")]]}}}), "not finite"),
    ],
)
def test_pictures_that_carry_none(tmp_path: Path, text: str | None, said: str) -> None:
    save_png(tmp_path / "picture.png", text)
    with pytest.raises(InversionError, match=said):
        read_embeddings(tmp_path / "picture.png")


def test_a_picture_cut_short_is_damaged(tmp_path: Path) -> None:
    save_png(tmp_path / "whole.png", encoded({}))
    (tmp_path / "picture.png").write_bytes((tmp_path / "whole.png").read_bytes()[:30])
    with pytest.raises(InversionError, match="damaged or cut short"):
        read_embeddings(tmp_path / "picture.png")


def test_a_word_can_be_renamed() -> None:
    assert Concept.load(FILES / "kohya.safetensors", placeholder="<frida>").placeholder == "<frida>"


def test_of_two_words_one_is_asked_for() -> None:
    file = FILES / "two_concepts.safetensors"
    with pytest.raises(InversionError, match=r"2 words \(<a>, <b>\): say which one"):
        Concept.load(file)
    with pytest.raises(InversionError, match=r"2 words \(<a>, <b>\), and <c> is none of them: say which one"):
        Concept.load(file, placeholder="<c>")                               # a new name, but of which?
    first, second = (Concept.load(file, placeholder=word) for word in ("<a>", "<b>"))
    both = load_file(file)
    assert torch.equal(first.vectors, both["<a>"])
    assert torch.equal(second.vectors, both["<b>"])


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("sdxl.safetensors", None, r"made for SDXL.*two text encoders.*Stable Diffusion 1\.x or 2\.x"),
        (
            "sd2_width_1024.safetensors",
            768,
            r"with Stable Diffusion 2.x and has vectors of width 1024; this model is .* 1.x and needs 768:",
        ),
        ("diffusers.safetensors", 1024, r"with Stable Diffusion 1.* 768; this model is .* 2.x and needs 1024:"),
        ("non_finite.safetensors", None, "empty or not finite"),
        ("git_lfs_pointer.safetensors", None, "git-lfs pointer.*git lfs pull"),
        ("truncated.safetensors", None, "damaged or cut short"),
        ("nothing.safetensors", None, "there is no embedding file"),
    ],
)
def test_what_is_refused(name: str, width: int | None, message: str) -> None:
    with pytest.raises(InversionError, match=message):
        Concept.load(FILES / name, width=width)


@pytest.mark.parametrize("params", [{}, None, torch.zeros(2, 4), [torch.zeros(2, 4)]])
def test_parameters_without_names_are_refused(params: object, tmp_path: Path) -> None:
    torch.save({"string_to_param": params, "name": "x"}, tmp_path / "x.pt")
    with pytest.raises(InversionError, match=r"x\.pt is no embedding file: its string_to_param holds no vectors"):
        Concept.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(0), "are empty or not finite"),
        (torch.zeros(3, 0), "are empty or not finite"),
        (torch.zeros(2, 4, device="meta"), r"'<a>' is a tensor \(2, 4\) of torch.strided on meta, not"),
        (torch.ones(2, 4).to_sparse(), r"'<a>' is a tensor \(2, 4\) of torch.sparse_coo on cpu, not"),
        (torch.ones(2, 4).int(), r"'<a>' is a tensor \(2, 4\) of torch.int32, not vectors \(n, D\) of floats"),
        (torch.ones(1, 1).expand(1 << 40, 768), r"'<a>' is \(1099511627776, 768\), more numbers than the file holds"),
    ],
)
def test_tensors_that_are_no_vectors_are_refused(value: torch.Tensor, said: str, tmp_path: Path) -> None:
    torch.save({"<a>": value}, tmp_path / "x.pt")
    with pytest.raises(InversionError, match=said):
        Concept.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "tensors",
    [
        {"text_encoders_0": torch.ones(2, 768), "text_encoders_1": torch.ones(2, 1280)},           # SDXL, by diffusers
        {"clip_l": torch.ones(2, 768), "t5": torch.ones(2, 4096)},
    ],
)
def test_tensors_of_several_widths_are_not_words_of_one_model(tensors: dict, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=r"2 tensors of widths \d+, \d+.*several text encoders.*or holds a LoRA"):
        Concept.load(tmp_path / "x.safetensors", placeholder=next(iter(tensors)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unet.to_q.lora_A.weight", "a LoRA"), ("lora_te_text_model_encoder.alpha", "a LoRA"),
        ("model.diffusion_model.out.2.weight", "a Stable Diffusion checkpoint"),
    ],
)  # fmt: skip
def test_other_weights_are_called_by_their_kind(tmp_path: Path, name: str, said: str) -> None:
    save_file({name: torch.ones(4, 768)}, tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=f"x.safetensors is {said}.*: a learned word is a file of vectors alone"):
        Concept.load(tmp_path / "x.safetensors")


def test_the_name_of_a_text_encoder_is_no_word(tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(2, 768)}, tmp_path / "frida.safetensors")
    assert Concept.load(tmp_path / "frida.safetensors").placeholder == "frida"


def test_words_under_numbers(tmp_path: Path) -> None:
    torch.save({"string_to_param": {265: torch.ones(1, 8), 266: torch.zeros(1, 8)}}, tmp_path / "x.pt")
    with pytest.raises(InversionError, match=r"holds 2 words \(265, 266\)"):
        Concept.load(tmp_path / "x.pt")
    assert torch.equal(Concept.load(tmp_path / "x.pt", placeholder="266").vectors, torch.zeros(1, 8))


def test_a_file_whose_name_is_no_word_says_how_to_call_it(tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 4)}, tmp_path / "my dog.safetensors")
    with pytest.raises(InversionError, match=r"of .*my dog\.safetensors would be called 'my dog'.*WORD=FILE"):
        Concept.load(tmp_path / "my dog.safetensors")
    assert Concept.load(tmp_path / "my dog.safetensors", placeholder="<dog>").placeholder == "<dog>"


def test_the_family_that_a_file_names_wins_over_its_width(tmp_path: Path) -> None:
    Concept("<x>", torch.zeros(1, 160), {"family": "emoji"}).save(tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=r"learned with emoji and has vectors of width 160;.*768"):
        Concept.load(tmp_path / "x.safetensors", width=768)
    with pytest.raises(InversionError, match="was learned with emoji; this model is emoji-glide: use"):
        Concept.load(tmp_path / "x.safetensors", width=160, family="emoji-glide")


def test_families_go_by_their_published_names(tmp_path: Path) -> None:
    families = {"glide": (512, "GLIDE"), "sd1": (768, "Stable Diffusion 1.x"), "sd2": (1024, "Stable Diffusion 2.x")}
    for family, other in itertools.permutations(families, 2):
        (width, learned), (needs, wanted) = families[family], families[other]
        Concept("<x>", torch.zeros(1, width), {"family": family}).save(tmp_path / "x.safetensors")
        said = rf"<x> in .*x\.safetensors was learned with {learned} and .* {width}; this model is {wanted} .* {needs}:"
        with pytest.raises(InversionError, match=said):
            Concept.load(tmp_path / "x.safetensors", width=needs, family=other)


def test_a_model_of_classes_has_no_use_for_a_word(tmp_path: Path) -> None:
    Concept("<x>", torch.zeros(1, 160), {"family": "emoji"}).save(tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=r"<x> in .*x\.safetensors is a word, and this model is told classes"):
        Concept.load(tmp_path / "x.safetensors", width=0, family="classes")


class Bomb:
    """Runs something when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    torch.save({"<x>": torch.zeros(1, 8), "bomb": Bomb(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(InversionError, match="cannot be read as plain tensors"):
        Concept.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [{}, {"<x>": "text"}, {"<x>": torch.zeros(1, 2, 3)}, {"<x>": torch.zeros(2, 3).int()}, [1, 2]]
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InversionError, match="embedding"):
        Concept.load(tmp_path / "x.pt")


@pytest.mark.parametrize("data", [b"", b"not a pickle at all", b"PK\x03\x04 half a zip"])
def test_damaged_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(InversionError, match="damaged"):
        Concept.load(tmp_path / "x.bin")


def test_a_safetensors_file_is_known_by_its_name_too(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"an error page, perhaps")
    with pytest.raises(InversionError, match=r"damaged or cut short \(.*\): download it again"):
        Concept.load(tmp_path / "x.safetensors")


def test_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    save_file({"<x>": torch.ones(2, 8)}, tmp_path / "x.pt")
    assert torch.equal(Concept.load(tmp_path / "x.pt").vectors, torch.ones(2, 8))
