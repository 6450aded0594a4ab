"""The model that ships: what it was trained on, that it fits, and that its words mean what they say."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import inversion
import models
from diffusion import Schedule
from guidance import generate
from inversion import Concept, StepReport, TrainConfig, find_images, read_images, read_templates, train
from models import LatentModel
from models.loading import EMBEDDED

FOLDER = EMBEDDED["emoji"]
HELD_OUT = (FOLDER / "held_out.txt").read_text().split("\n")[:-1]


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return models.load("emoji")


@pytest.fixture(scope="module")
def training_set() -> tuple[Tensor, list[str], list[str]]:
    """Latents (N, 4, 16, 16), names, and a caption of each."""
    with safe_open(FOLDER / "training_latents.safetensors", "pt") as file:
        rows = json.loads(file.metadata()["rows"])
        return file.get_tensor("latents") / 16, [r["name"] for r in rows], [r["caption"] for r in rows]


def test_all_parts_together_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 32e6
    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            dtype = torch.int8 if file.parent == FOLDER else torch.float16      # the training latents; or weights
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {dtype}, file  # noqa: SIM118


def test_what_is_held_out_was_not_trained_on(training_set: tuple[Tensor, list[str], list[str]]) -> None:
    _, names, captions = training_set
    assert {"poodle", "guide dog", "service dog"} < set(HELD_OUT)
    assert len(set(HELD_OUT)) >= 15
    assert len(set(names)) >= 600
    assert not set(names) & set(HELD_OUT)
    assert not any(name in caption for caption in captions for name in HELD_OUT)


def test_it_knows_what_it_is(model: LatentModel) -> None:
    assert (model.family, model.prediction, model.resolution) == ("emoji", "v_prediction", 64)
    assert models.load(FOLDER).family == "emoji"          # as a folder, too
    assert not model.tokenizer.is_word("<poodle>")


def test_it_is_drawn_as_its_card_says(model: LatentModel) -> None:
    card = " ".join((FOLDER / "README.md").read_text().split())
    sampler, steps, scale, _ = model.sampling
    assert f"Drawn by default with {steps} steps of {sampler.upper()} at a guidance scale of {scale:g}." in card


def test_its_words_tell_its_pictures(
    model: LatentModel, training_set: tuple[Tensor, list[str], list[str]]
) -> None:
    """At little signal, the error with an image's own caption is well below that with another's."""
    latents, _, captions = training_set
    schedule, g = Schedule(**model.schedule), torch.Generator().manual_seed(0)
    which = torch.randperm(len(captions), generator=g)[:32]
    x0, t = latents[which], torch.full((32,), 900)
    noise = torch.randn(x0.shape, generator=g)
    x_t, v = schedule.q_sample(x0, t, noise), schedule.velocity(x0, t, noise)
    own = [captions[i] for i in which.tolist()]
    with torch.no_grad():
        right, wrong = (
            (model.predict(x_t, t, model.encode_text(model.tokenizer.encode(texts))) - v).square().mean().item()
            for texts in (own, own[1:] + own[:1])
        )
    assert right < 0.6 * wrong  # words that say nothing give 1; what a half-trained model had after 500 steps was 0.8


def test_it_learns_a_word_that_it_never_met(tmp_path: Path) -> None:
    """End to end: learn the poodle for a few steps, interrupted and resumed, and draw with the word."""
    model, stop = models.load("emoji"), 10
    files = find_images(Path(inversion.__file__).parent / "data" / "poodle")
    images, templates = read_images(files, model.resolution), [read_templates("emoji")] * len(files)
    start = Concept.from_text(model, "<poodle>", "dog", 4)
    config = TrainConfig(20, 8, 1, 3e-2, validation_pairs=4, validate_every=10, checkpoint_every=10)
    learn = partial(train, model, start, images, templates, config, keep_encoder=True)

    def interrupt(report: StepReport) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    file = tmp_path / "poodle.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(file=file, on_step=interrupt)
    resumed, whole = learn(file=file, resume=True), learn()
    assert torch.equal(resumed.concept.vectors, whole.concept.vectors)
    losses = resumed.metrics
    assert losses["validation_loss_best"] < 0.95 * losses["validation_loss_initial"]    # 400 steps bring 25 %
    learned = Concept.load(file, model.width, family=model.family)
    drawn, before = (
        generate(model, "an emoji of <poodle>", concepts=[word], steps=5, generator=0) for word in (learned, start)
    )
    assert (drawn - before).abs().mean() > 0.02                                         # five grey levels of 255
