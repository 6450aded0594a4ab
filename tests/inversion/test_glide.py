"""Textual inversion on GLIDE's tokens: the same trainer, no branch on the family inside it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import Schedule
from guidance import generate
from inversion import Concept, InversionError, TrainConfig, train
from inversion.objective import Batch, denoising_loss, random_batch
from inversion.prompts import check_prompts
from models import GlideModel
from tests.tiny import tiny_glide

TEMPLATES = [["a photo of {}", "{}", "a picture of {}"]] * 2


def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def batch(model: GlideModel) -> Batch:
    generator, which = torch.Generator().manual_seed(1), torch.tensor([0, 1, 0, 1])
    return random_batch(images(), TEMPLATES, which, which + 1, model.x0_shape(16, 16), 1000, generator)


def test_the_loss_is_on_the_noise_that_the_network_predicts() -> None:
    """On the first half of its answer; the second is the variance that it learned."""
    model, found = tiny_glide(), batch(tiny_glide())
    schedule = Schedule(**model.schedule)
    losses = denoising_loss(model, schedule, found, "dog")
    prompts = [line.replace("{}", "dog") for line in found.templates]
    a = schedule.alphas_bar[found.t].float()[:, None, None, None]
    x_t = a.sqrt() * found.moments + (1 - a).sqrt() * found.noise               # x_0 is the image itself
    answer = model.predict(x_t, found.t, model.encode_text(model.tokenizer.encode(prompts)))
    assert answer.shape[1] == 6
    torch.testing.assert_close(losses, (answer[:, :3] - found.noise).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_an_extended_table() -> None:
    """Vectors as further rows of the table, in float64; an ordinary embedding, gradients of all of it."""
    model = tiny_glide()
    model.unet.double(), model.text.double()
    concept = Concept("<x>", torch.randn(2, 32, generator=torch.Generator().manual_seed(2)))
    concept.vectors = concept.vectors.double().requires_grad_()
    loss = denoising_loss(model, Schedule(**model.schedule), batch(model), "<x>", concept).sum()
    (ours,) = torch.autograd.grad(loss, concept.vectors)

    table = torch.nn.Parameter(torch.cat([model.text.token_embedding.weight, concept.vectors.detach()]))
    model.text.token_embedding.weight = table
    encode = model.encode_text
    model.encode_text = lambda tokens, extra: encode(tokens)          # the ids already point at the new rows
    again = denoising_loss(model, Schedule(**model.schedule), batch(model), "<x>", concept).sum()
    (theirs,) = torch.autograd.grad(again, table)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)        # the mean of the squares is taken in float32
    torch.testing.assert_close(ours, theirs[-2:], rtol=1e-5, atol=1e-9)


def test_it_learns_and_touches_nothing_else(tmp_path: Path) -> None:
    model = tiny_glide()
    before = {name: t.clone() for net in (model.unet, model.text) for name, t in net.state_dict().items()}
    concept = Concept.from_text(model, "<x>", "large white dog")
    config = TrainConfig(steps=30, batch_size=4, accumulation=1, learning_rate=0.05, validate_every=10)
    result = train(model, concept, images(), TEMPLATES, config, name="cat", file=tmp_path / "x.safetensors")
    assert result.metrics["validation_loss_best"] < result.metrics["validation_loss_initial"]
    assert result.metrics["validation_loss_caption"] > 0
    after = {name: t for net in (model.unet, model.text) for name, t in net.state_dict().items()}
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert Concept.load(tmp_path / "x.safetensors", width=32).vectors.shape == (3, 32)


def test_the_three_ways_to_begin() -> None:
    model = tiny_glide()
    dog = model.embedding(model.tokenizer.tokens_of("dog")[0])
    one, ten, phrase = (
        Concept.from_text(model, "<x>", *given).vectors for given in (("dog",), ("dog", 10), ("large white dog",))
    )
    assert torch.equal(one, dog[None])
    assert torch.equal(ten, dog.expand(10, -1))
    assert phrase.shape == (3, 32)
    assert torch.equal(phrase[2], dog)


def test_a_word_may_fill_the_whole_context_and_no_more() -> None:
    model = tiny_glide()
    vectors = torch.randn(24, 32)
    check_prompts(model.tokenizer, Concept("<x>", vectors), [["{}"]])
    with pytest.raises(InversionError, match="at most 23 vectors"):
        check_prompts(model.tokenizer, Concept("<x>", vectors), [["a {}"]])


def test_a_word_of_another_family_is_refused_by_its_width() -> None:
    with pytest.raises(InversionError, match=r"Stable Diffusion 1\.x .*width 768;"):
        train(tiny_glide(), Concept("<x>", torch.randn(1, 768)), images(), TEMPLATES)


def test_a_word_of_another_family_and_the_same_width_is_refused_too(tmp_path: Path) -> None:
    learned = Concept("<x>", torch.randn(1, 32), {"family": "emoji"})
    learned.save(tmp_path / "x.safetensors")
    for use in (
        lambda: train(tiny_glide(), learned, images(), TEMPLATES),
        lambda: Concept.load(tmp_path / "x.safetensors", 32, family="custom-glide"),
        lambda: generate(tiny_glide(), "a <x>", concepts=[learned], steps=2),
    ):
        with pytest.raises(ValueError, match=r"emoji.*custom-glide"):
            use()
    Concept.load(tmp_path / "x.safetensors", 32)        # whose model is not known: the width alone decides
