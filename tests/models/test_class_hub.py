"""guided-diffusion's files by their names, from a server of tiny ones. (How a fetch resumes: test_glide_hub.py.)"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import models
from models import ModelError, class_hub
from models.presets import ADM, ADM_CLASSIFIERS, ADM_UPSAMPLERS, COSINE, ClassPreset
from tests.models.test_adm import tiny
from tests.models.test_glide_hub import Server, serving
from tests.tiny import tiny_classes


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """A server at the published address, of tiny networks that count as the published ones; and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, upsampler, network = tiny_classes(), tiny_classes(1, factor=4), tiny()
    config = class_hub.ClassifierConfig(network.config, 16)
    monkeypatch.setitem(ADM, "64", ClassPreset(base.unet.config, COSINE, 16))
    monkeypatch.setitem(ADM_UPSAMPLERS, "64-256", ClassPreset(upsampler.unet.config, COSINE, 64, factor=4))
    monkeypatch.setitem(ADM_CLASSIFIERS, "64", config)
    with serving() as (kind, address):
        monkeypatch.setattr(class_hub, "ADDRESS", address)
        files = {"64x64_diffusion": base.unet, "64_256_upsampler": upsampler.unet, "64x64_classifier": network}
        for name, of in files.items():
            torch.save(of.state_dict(), tmp_path / "x.pt")
            kind.files[f"{name}.pt"] = (tmp_path / "x.pt").read_bytes()
        yield kind


def test_models_and_classifiers_are_fetched_once(server: type[Server], tmp_path: Path) -> None:
    for _ in range(2):
        model, upsampler = models.load("adm-64", device="cpu"), models.load("adm-64-256", device="cpu")
        network = models.load_classifier("adm-64", device="cpu")
    assert (model.source, model.null, model.factor, str(model.classes)) == ("adm-64", False, 1, "0 to 2")
    assert (upsampler.source, upsampler.factor, network.classes) == ("adm-64-256", 4, 5)
    assert torch.equal(model.unet.out[2].weight, tiny_classes().unet.out[2].weight)
    assert server.begun == [("64x64_diffusion.pt", 0), ("64_256_upsampler.pt", 0), ("64x64_classifier.pt", 0)]
    assert (tmp_path / "cache/oneword/guided-diffusion/64x64_diffusion.pt").is_file()


@pytest.mark.parametrize("load", [models.load, models.load_classifier])
def test_a_dtype_that_cannot_be_is_refused_before_anything_is_fetched(
    server: type[Server], load: Callable[..., object]
) -> None:
    with pytest.raises(ModelError, match="float16 on a CPU runs hundreds of times slower than float32: use [^;]*$"):
        load("adm-64", dtype="float16", device="cpu")
    assert not server.begun


def test_a_file_that_is_another_is_refused_by_name(server: type[Server], tmp_path: Path) -> None:
    server.files["64x64_diffusion.pt"] = server.files["64x64_classifier.pt"]
    server.files["64x64_classifier.pt"] = server.files["64_256_upsampler.pt"]
    with pytest.raises(ModelError, match=r"is a classifier .*remove .*64x64_diffusion\.pt to have it fetched anew"):
        models.load("adm-64")
    with pytest.raises(ModelError, match=r"is a UNet .*remove .*64x64_classifier\.pt to have it fetched anew"):
        models.load_classifier("adm-64")


def test_every_name_has_a_file_and_numbers() -> None:
    """As the README of openai/guided-diffusion @ 22e0df8 names them."""
    assert {name.removeprefix("adm-") for name in class_hub.FILES} == (ADM | ADM_UPSAMPLERS).keys()
    assert {name.removeprefix("adm-") for name in class_hub.CLASSIFIERS} == ADM_CLASSIFIERS.keys()
    with pytest.raises(ModelError, match="known by name are: .*adm-256-uncond.*adm-128-512"):
        models.load("adm-1024")
