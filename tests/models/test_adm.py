"""guided-diffusion's networks: the tensors of its public files, and a classifier that refuses what it cannot read."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models import ModelError
from models.class_names import ClassNames
from models.classifier import Classifier, ClassifierConfig
from models.presets import ADM, ADM_CLASSIFIERS, ADM_UPSAMPLERS
from models.unet import UNet, UNetConfig
from models.weights import on_meta
from tests.tiny import randomise

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in content["tensors"].items()}


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", ADM)
def test_the_published_unets_have_exactly_these_tensors(name: str) -> None:
    size, *rest = name.split("-")
    file = "_".join([f"adm_{size}x{size}_diffusion", *rest])
    assert shapes(on_meta(lambda: UNet(ADM[name].unet))) == manifest(file)


# What no tensor tells, in the README's command lines @ 22e0df8: num_heads, num_head_channels, the order of attention
# ("self" with use_new_attention_order), noise_schedule ("cosine" there). The betas are those of gaussian_diffusion.py.
COSINE = {"name": "squaredcos_cap_v2", "steps": 1000}
LINEAR = {"name": "linear", "steps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
FLAGS = {
    "64": (None, 64, "self", COSINE),
    "128": (4, None, "self_legacy", LINEAR),
    "256": (None, 64, "self_legacy", LINEAR),
    "256-uncond": (None, 64, "self_legacy", LINEAR),
    "512": (None, 64, "self_legacy", LINEAR),
    "64-256": (4, None, "self_legacy", LINEAR),
    "128-512": (None, 64, "self_legacy", LINEAR),
}


@pytest.mark.parametrize("name", ADM | ADM_UPSAMPLERS)
def test_what_no_tensor_tells_is_as_the_published_flags_say(name: str) -> None:
    preset = (ADM | ADM_UPSAMPLERS)[name]
    unet = preset.unet
    assert (unet.num_heads, unet.head_channels, unet.attention, preset.schedule) == FLAGS[name]


@pytest.mark.parametrize("name", ADM_CLASSIFIERS)
def test_heads_of_the_classifiers_are_as_published(name: str) -> None:
    """create_classifier in script_util.py @ 22e0df8 has no other: 64 channels each, the old order of attention."""
    config = ADM_CLASSIFIERS[name].descent
    assert (config.num_heads, config.head_channels, config.attention) == (None, 64, "self_legacy")


@pytest.mark.parametrize("name", ADM_CLASSIFIERS)
def test_the_published_classifiers_have_exactly_these_tensors(name: str) -> None:
    network = on_meta(lambda: Classifier(ADM_CLASSIFIERS[name]))
    assert shapes(network) == manifest(f"adm_{name}x{name}_classifier")


def tiny() -> Classifier:
    config = UNetConfig(3, 5, 32, (1, 2), 1, (2,), None, 16, attention="self_legacy", scale_shift=True)
    return Classifier(ClassifierConfig(config, 16))


def test_a_classifier_of_another_size_or_channel_count() -> None:
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 16, 16)):
        with pytest.raises(ModelError, match=r"reads images \(3, 16, 16\)"):
            tiny()(wrong, torch.tensor([5]))
    for size in (15, 0, -2):
        with pytest.raises(ModelError, match=f"a classifier of {size} pixels cannot .* multiple of 2"):
            ClassifierConfig(tiny().config, size)
    with pytest.raises(ModelError, match="2 names for 5 classes: a, b"):
        Classifier(ClassifierConfig(tiny().config, 16), ClassNames(("a", "b")))


def test_a_network_that_reads_no_text_needs_none() -> None:
    network = UNet(UNetConfig(3, 3, 32, (1,), 1, (1,), 2, attention="self", scale_shift=True, num_classes=4))
    randomise(network)
    x, t = torch.ones(2, 3, 8, 8), torch.tensor([5, 5])
    out = network(x, t, pooled=network.label_emb(torch.tensor([0, 3])))
    again = network(x, t, pooled=network.label_emb(torch.tensor([0, 0])))
    torch.testing.assert_close(again, out[:1].expand_as(out), rtol=0, atol=1e-5)    # rows of one product, rounded alike
    assert not torch.allclose(out[0], out[1], atol=1e-4)
