"""What needs more than this machine may have: public weights (`-m weights`), a GPU (`-m cuda`)."""

import os

import pytest
import torch

import models
from guidance import generate
from inversion import Concept, TrainConfig, train
from models import GlideModel, LatentModel
from tests.tiny import tiny_glide, tiny_model

VARIABLE = "ONEWORD_WEIGHTS"


@pytest.mark.weights
def test_public_weights_learn_and_draw() -> None:
    """A folder, file, hub id or name of Stable Diffusion, GLIDE or guided-diffusion; the last learns no word.

    Not an upsampler's: it draws from an image. SD 2.x single files need ONEWORD_PREDICTION.
    """
    source = os.environ.get(VARIABLE)
    if source is None:
        pytest.fail(f"{VARIABLE} names no weights: set it to a folder, a file or a hub id")
    model = models.load(source, "auto", prediction=os.environ.get("ONEWORD_PREDICTION"))
    size = model.resolution
    prompt = "a photo of a dog" if model.width else "207" if model.classes.names else ""
    drawn = generate(model, prompt, steps=8, generator=0)
    assert drawn.std() > 0.1                                      # a picture, not a grey field
    if not model.width:
        return
    start = Concept.from_text(model, "<frida>", "dog")
    images = torch.nn.functional.interpolate(drawn, size).clamp(-1, 1)
    config = TrainConfig(4, 1, 1, 5e-3, validation_pairs=2, validate_every=4)
    result = train(model, start, images, [["a photo of {}"]], config)
    moved = (result.concept.vectors - start.vectors).abs().max()
    assert moved > 0 or result.metrics["best_step"] == 0
    assert 0 < result.metrics["validation_loss_initial"] < 1      # eps of variance 1: less than knowing nothing


@pytest.mark.cuda
@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_a_gpu_draws_and_learns_what_the_cpu_does(make: type) -> None:
    """The same seeds on both: noise is drawn on the CPU. Tolerances: float32 with other orders of summation."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    drawn, learned = [], []
    for device in ("cpu", "cuda"):
        model: LatentModel | GlideModel = make().to(device)
        drawn.append(generate(model, "a photo of a dog", steps=4, sampler="ddim", generator=0))
        config = TrainConfig(4, 2, 1, 1e-2, validation_pairs=2, validate_every=4)
        learned.append(train(model, Concept.from_text(model, "<x>", "dog"), images, [["a {}"]] * 2, config))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-3)
    losses = [result.metrics["validation_loss_best"] for result in learned]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
