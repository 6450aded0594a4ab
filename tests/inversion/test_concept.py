from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion import Concept, InversionError
from inversion.concept import require_new_word
from models import LatentModel
from tests.tiny import tiny_classes, tiny_model


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return tiny_model()


def rows(model: LatentModel, text: str) -> Tensor:
    table = model.text.embeddings.token_embedding.weight
    return table[model.tokenizer.tokens_of(text)]


def test_a_word_gives_its_own_vector(model: LatentModel) -> None:
    concept = Concept.from_text(model, "<x>", "dog")
    assert torch.equal(concept.vectors, rows(model, "dog"))
    assert concept.metadata["init"] == "dog"
    assert concept.metadata["init_rule"] == "one vector a token"
    assert (concept.metadata["family"], concept.metadata["source"]) == ("tiny", "tiny:0")


def test_a_phrase_gives_one_vector_a_token(model: LatentModel) -> None:
    for n in (None, 4):
        concept = Concept.from_text(model, "<x>", "a large white dog", n)
        assert torch.equal(concept.vectors, rows(model, "a large white dog"))
        assert concept.metadata["init_rule"] == "one vector a token"


def test_n_copies_of_a_word(model: LatentModel) -> None:
    concept = Concept.from_text(model, "<x>", "dog", n=3)
    assert torch.equal(concept.vectors, rows(model, "dog").repeat(3, 1))


def test_a_shorter_phrase_is_cycled(model: LatentModel) -> None:
    concept = Concept.from_text(model, "<x>", "white dog", n=5)
    assert torch.equal(concept.vectors, rows(model, "white dog white dog white"))
    assert concept.metadata["init_rule"] == "2 tokens cycled to 5 vectors"


def test_a_model_of_classes_has_no_words_to_start_from() -> None:
    with pytest.raises(InversionError, match="is told classes and reads no words"):
        Concept.from_text(tiny_classes(), "<x>", "dog")


def test_a_longer_phrase_is_refused(model: LatentModel) -> None:
    with pytest.raises(InversionError, match=r"4 tokens and does not fit 3 vectors: use at least 4"):
        Concept.from_text(model, "<x>", "a large white dog", n=3)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_initial_text_of_no_tokens_is_refused(model: LatentModel, text: str) -> None:
    with pytest.raises(InversionError, match="has no tokens: give a word"):
        Concept.from_text(model, "<x>", text)


def test_what_is_no_text_and_no_number_is_refused(model: LatentModel) -> None:
    with pytest.raises(InversionError, match="starts from a text, such as 'dog', not from None"):
        Concept.from_text(model, "<x>", None)
    for n in (1.5, "2"):
        with pytest.raises(InversionError, match=f"a whole one, or None, not {n!r}"):
            Concept.from_text(model, "<x>", "dog", n=n)


def test_a_placeholder_that_is_a_word_is_refused(model: LatentModel) -> None:
    with pytest.raises(InversionError, match="'dog' is already a word of the tokenizer.*'<dog>'"):
        Concept.from_text(model, "dog", "cat")


def test_the_word_that_it_should_be_instead_is_another(model: LatentModel) -> None:
    with pytest.raises(InversionError, match=r"'<\|endoftext\|>' is already .*, such as '<endoftext>'"):
        Concept.from_text(model, "<|endoftext|>", "cat")


def test_the_word_that_it_should_be_instead_is_new_too() -> None:
    with pytest.raises(InversionError, match="such as '<frida>'$"):
        require_new_word(SimpleNamespace(is_word={"dog", "<dog>"}.__contains__), "dog")


@pytest.mark.parametrize("placeholder", ["", " <x>", "<x>\n", "{}", 5])
def test_a_placeholder_must_be_findable(placeholder: str) -> None:
    with pytest.raises(InversionError, match="cannot be a placeholder"):
        Concept(placeholder, torch.zeros(1, 4))


@pytest.mark.parametrize("vectors", [torch.zeros(4), torch.zeros(0, 4), torch.full((1, 4), torch.nan)])
def test_vectors_must_be_vectors(vectors: Tensor) -> None:
    with pytest.raises(InversionError, match="must be finite and"):
        Concept("<x>", vectors)


def test_zero_vectors_are_refused(model: LatentModel) -> None:
    with pytest.raises(InversionError, match="at least one vector, not 0"):
        Concept.from_text(model, "<x>", "dog", n=0)


def test_a_concept_is_a_copy_of_the_table(model: LatentModel) -> None:
    before = rows(model, "dog").clone()
    Concept.from_text(model, "<x>", "dog").vectors.zero_()
    assert torch.equal(rows(model, "dog"), before)


def test_save_and_load_bring_back_everything(tmp_path: Path) -> None:
    concept = Concept("<frida>", torch.randn(3, 8), {"init": "dog", "steps": "300"})
    file = tmp_path / "deep" / "frida.safetensors"
    concept.save(file)
    again = Concept.load(file, width=8)
    assert torch.equal(again.vectors, concept.vectors)
    assert (again.placeholder, again.metadata) == ("<frida>", concept.metadata)
    assert [f.name for f in file.parent.iterdir()] == ["frida.safetensors"]  # nothing left beside it


def test_a_saved_file_has_one_key_named_by_the_word(tmp_path: Path) -> None:
    Concept("<frida>", torch.randn(2, 8).double(), {"init": "dog"}).save(tmp_path / "f.safetensors")
    tensors = load_file(tmp_path / "f.safetensors")
    assert list(tensors) == ["<frida>"]
    assert tensors["<frida>"].dtype == torch.float32
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == {"init": "dog", "format": "pt"}           # transformers refuses a file without


def test_what_is_said_of_a_word_is_written_as_text(tmp_path: Path) -> None:
    Concept("<x>", torch.ones(1, 8), {"steps": 300, "init": None}).save(tmp_path / "x.safetensors")
    assert Concept.load(tmp_path / "x.safetensors").metadata == {"steps": "300", "init": "None"}


def test_vectors_that_lie_otherwise_in_memory_are_saved(tmp_path: Path) -> None:
    vectors = torch.randn(8, 2).T
    Concept("<x>", vectors).save(tmp_path / "x.safetensors")
    assert torch.equal(Concept.load(tmp_path / "x.safetensors").vectors, vectors)


@pytest.mark.parametrize("name", ["x.pt", "x.PT", "x.pth", "x.bin", "x.ckpt", "x.pkl"])
def test_a_word_is_not_written_under_the_name_of_a_pickle(tmp_path: Path, name: str) -> None:
    """Other tools unpickle what is called so, and say only that it is damaged."""
    with pytest.raises(InversionError, match=r"is named as a pickle.* call it x\.safetensors"):
        Concept("<x>", torch.ones(1, 8)).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.safetensors"
    Concept("<frida>", torch.ones(1, 8)).save(file)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Concept("<frida>", torch.zeros(1, 8)).save(file)
    assert Concept.load(file).vectors.sum() == 8
    assert [f.name for f in tmp_path.iterdir()] == ["f.safetensors"]


@pytest.mark.parametrize("vectors", [[[0.0, 1.0]], np.zeros((1, 2), np.float32)])
def test_vectors_that_were_mixed_elsewhere_are_named(vectors: object) -> None:
    with pytest.raises(InversionError, match="vectors of <x> must be a tensor .n, D., not a (list|ndarray): make"):
        Concept("<x>", vectors)
