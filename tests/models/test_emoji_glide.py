"""The small GLIDE that ships: that it fits, draws through its upsampler, and learns a word that it never met."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import inversion
import models
from guidance import generate
from inversion import Concept, TrainConfig, find_images, read_images, read_templates, train
from models import GlideModel
from models.loading import EMBEDDED

FOLDER = EMBEDDED["emoji-glide"]


@pytest.fixture(scope="module")
def model() -> GlideModel:
    return models.load("emoji-glide")


def test_both_parts_together_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 25e6


def test_it_knows_what_it_is(model: GlideModel) -> None:
    assert (model.family, model.source, model.resolution) == ("emoji-glide", "emoji-glide", 32)
    assert (model.upsampler.factor, model.upsampler.resolution) == (2, 64)


def test_a_red_apple_is_red_and_enlarged(model: GlideModel) -> None:
    """The middle of the picture, where the apple is, has more red than green and blue; a leaf and white surround it."""
    drawn = generate(model, ["red apple"] * 2, steps="20", sampler="ddim", generator=0, batch_size=2)
    assert drawn.shape == (2, 3, 64, 64)
    red, green, blue = drawn[:, :, 24:48, 16:48].mean(dim=(0, 2, 3))
    assert red > green + 0.5          # of [-1, 1]; white or grey has them equal
    assert red > blue + 0.5


def test_the_upsampler_knows_more_than_a_bilinear_one(model: GlideModel) -> None:
    """Of drawings that it never saw, reduced to half their size: what it makes of them is nearer to the whole ones."""
    folder = Path(next(iter(inversion.__path__))) / "data"
    whole = torch.cat([read_images(find_images(folder / name), 64) for name in ("octopus", "poodle")])
    small = F.avg_pool2d(whole, 2)
    drawn = generate(model.upsampler, ["an animal"] * len(whole), image=small, generator=0)
    plain = F.interpolate(small, scale_factor=2, mode="bilinear")
    error, of_plain = ((x - whole).square().mean(dim=(1, 2, 3)) for x in (drawn, plain))
    assert (error < 0.6 * of_plain).all()        # two thirds of a decibel would be 0.86; noise of 0.05 adds 0.0025


def test_it_learns_an_octopus(model: GlideModel) -> None:
    """From "fish" and two pictures; the octopus is in no training set. Noise of the loss falls out: it is fixed."""
    files = find_images(next(iter(inversion.__path__)) + "/data/octopus")
    images = read_images(files, model.resolution)
    concept = Concept.from_text(model, "<octopus>", "fish", 4)
    settings = TrainConfig(10, 8, 1, 2e-2, validate_every=5, validation_pairs=16)
    result = train(model, concept, images, [read_templates("emoji")] * len(files), settings, keep_encoder=True)
    first, best = (result.metrics[f"validation_loss_{key}"] for key in ("initial", "best"))
    assert best < 0.96 * first        # 60 steps of 16 go below 0.9; see the model's card
    assert torch.isfinite(result.concept.vectors).all()
