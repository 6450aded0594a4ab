"""The model of classes that ships, its classifier and its judge: that they fit, and mean what they say."""

import pytest
import torch
from torch import Tensor

import models
from guidance import classifier, generate
from models import ClassModel, load_classifier
from models.class_hub import DATA
from models.classifier import Classifier


@pytest.fixture(scope="module")
def networks() -> tuple[ClassModel, Classifier, Classifier]:
    """The model, the classifier that guides it, and the judge."""
    return models.load("emoji-classes"), load_classifier("emoji-classes"), load_classifier("emoji-classes-judge")


def test_all_together_are_small() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 10e6


def test_they_know_the_same_classes(networks: tuple[ClassModel, Classifier, Classifier]) -> None:
    model, guide, judge = networks
    assert model.classes == guide.names == judge.names
    assert {"clock", "face", "heart", "vehicle"} < {*model.classes.names}
    assert model.resolution == guide.image_size == judge.image_size == 32
    assert model.guides_itself
    assert model.source == "emoji-classes"


def seen(judge: Classifier, images: Tensor) -> list[str]:
    """The class that the judge sees in each image."""
    with torch.no_grad():
        return [judge.names.names[i] for i in judge(images, torch.zeros(len(images))).argmax(dim=1)]


@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_it_draws_what_it_is_asked_for(networks: tuple[ClassModel, Classifier, Classifier], kind: str) -> None:
    """Three drawings of each of eight classes: by guessing, nine would be right with a chance of 2e-3."""
    model, guide, judge = networks
    asked = [*model.classes.names] * 3
    guided = {"scale": 3} if kind == "free" else {"scale": 0, "guidance": classifier(guide, asked, 8.0)}
    drawn = generate(model, asked, steps=15, sampler="ddpm", generator=0, batch_size=len(asked), **guided)
    right = sum(a == b for a, b in zip(asked, seen(judge, drawn)))
    assert right >= 9
