import pytest
import torch
from torch import Tensor

from diffusion import Schedule
from inversion import Concept
from inversion.objective import denoising_loss, random_batch
from inversion.training import step_generator
from inversion.validation import STREAM, Validation
from models import LatentModel
from tests.tiny import tiny_model

TEMPLATES = [["a photo of {}", "{}"], ["a picture of {}"], ["a {}"]]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return tiny_model()


@pytest.fixture(scope="module")
def moments() -> Tensor:
    return torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def validation(model: LatentModel, moments: Tensor, pairs: int = 4, batch_size: int = 5) -> Validation:
    return Validation(model, Schedule(**model.schedule), moments, TEMPLATES, SHAPE, pairs, batch_size)


def test_nothing_is_random(model: LatentModel, moments: Tensor) -> None:
    concept = Concept.from_text(model, "<x>", "dog")
    torch.manual_seed(0)
    first = validation(model, moments).loss("<x>", concept)
    torch.manual_seed(1)
    second = validation(model, moments)
    assert first == second.loss("<x>", concept) == second.loss("<x>", concept)


def test_what_it_draws_no_step_draws() -> None:
    """Of the largest seed that a training may have, and of more steps than anyone waits for."""
    assert step_generator(2**32 - 1, 10**9).initial_seed() < STREAM < 2**63


def test_every_image_meets_every_part_of_time(model: LatentModel, moments: Tensor) -> None:
    batch = validation(model, moments, pairs=8).batch
    assert len(batch) == 24
    for i in range(3):
        own = torch.tensor([torch.equal(m, moments[i]) for m in batch.moments])
        assert (batch.t[own] // 125).tolist() == list(range(8))  # one in each eighth of 1000


def test_every_template_has_its_turn(model: LatentModel, moments: Tensor) -> None:
    assert set(validation(model, moments).batch.templates) == {line for own in TEMPLATES for line in own}


def test_pairs_of_noise_differ(model: LatentModel, moments: Tensor) -> None:
    batch = validation(model, moments).batch
    assert len({noise.sum().item() for noise in torch.cat([batch.noise, batch.draw])}) == 24


def test_it_is_the_mean_of_the_denoising_loss(model: LatentModel, moments: Tensor) -> None:
    concept, check = Concept.from_text(model, "<x>", "dog", n=2), validation(model, moments)
    with torch.no_grad():
        losses = denoising_loss(model, check.schedule, check.batch, "<x>", concept)
    assert losses.dtype == torch.float32
    # the same network on other batch sizes: float32 rounding of sums over at most 576 terms
    assert check.loss("<x>", concept) == pytest.approx(losses.double().mean().item(), rel=1e-5)
    assert validation(model, moments, batch_size=1).loss("<x>", concept) == pytest.approx(
        check.loss("<x>", concept), rel=1e-5
    )


def test_plain_words_are_measured_alike(model: LatentModel, moments: Tensor) -> None:
    """A concept that is the vector of "dog" and the word "dog" are the same prompt, and so the same loss."""
    check = validation(model, moments)
    as_concept = check.loss("<x>", Concept.from_text(model, "<x>", "dog"))
    assert check.loss("dog") == as_concept
    assert check.loss("cat") != as_concept


def test_no_gradient_is_kept(model: LatentModel, moments: Tensor) -> None:
    vectors, recorded = Concept.from_text(model, "<x>", "dog").vectors.requires_grad_(), []
    hook = model.unet.register_forward_hook(lambda network, x, out: recorded.append(out.requires_grad))
    validation(model, moments).loss("<x>", Concept("<x>", vectors))
    hook.remove()
    assert recorded == [False] * 3                                      # 12 samples, 5 at once


@pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
def test_the_loss_is_on_what_the_model_predicts(moments: Tensor, form: str) -> None:
    """Written out once more from the formulas of the paper, in float64."""
    model = tiny_model(prediction=form)
    schedule, generator = Schedule(**model.schedule), torch.Generator().manual_seed(0)
    which = torch.tensor([0, 2])
    batch = random_batch(moments, TEMPLATES, which, which, SHAPE, 1000, generator)
    losses = denoising_loss(model, schedule, batch, "dog")
    mean, logvar = moments[which].chunk(2, dim=1)
    x0 = model.vae.config.scale * (mean + (logvar / 2).exp() * batch.draw)
    a = schedule.alphas_bar[batch.t].float()[:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * batch.noise
    wanted = batch.noise if form == "epsilon" else a.sqrt() * batch.noise - (1 - a).sqrt() * x0
    context = model.text(model.tokenizer.encode(["a photo of dog", "a dog"]).ids).context
    error = (model.unet(x_t, batch.t, context) - wanted) ** 2
    assert torch.allclose(losses, error.mean((1, 2, 3)), rtol=1e-5)  # float32 rounding in another order


def test_times_fill_their_strata_and_stay_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 1000, 1003):
        which = torch.zeros(size, dtype=torch.int64)
        batch = random_batch(torch.zeros(1, 2), [["{}"]], which, which, (1, 1, 1), 1000, generator)
        assert size != 1000 or torch.equal(batch.t, torch.arange(1000))         # a stratum each, which rounding leaves
        assert 0 <= batch.t.min() <= batch.t.max() <= 999
        # a stratum's own share of the times, to one step of rounding
        assert ((batch.t - torch.arange(size) * 1000 / size).abs() <= 1000 / size + 1).all()


def test_one_sample_may_have_any_time() -> None:
    """Stratifying a batch of one is drawing uniformly: mean 499.5, and 2000 draws leave ± 6.5 (one sigma)."""
    generator, zero = torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.int64)
    drawn = [
        random_batch(torch.zeros(1, 2), [["{}"]], zero, zero, (1, 1, 1), 1000, generator) for _ in range(2000)
    ]
    times = torch.cat([batch.t for batch in drawn]).double()
    assert abs(times.mean() - 499.5) < 4 * 6.5
    assert times.min() < 10
    assert times.max() > 989


def test_parts_are_the_whole(moments: Tensor) -> None:
    which = torch.arange(7) % 3
    batch = random_batch(moments, TEMPLATES, which, which, SHAPE, 1000, torch.Generator().manual_seed(0))
    parts = list(batch.parts(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    for name in ("moments", "t", "draw", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum((part.templates for part in parts), []) == batch.templates
