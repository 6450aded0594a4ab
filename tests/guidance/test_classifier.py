"""A classifier's guidance: where all is Gaussian the guided distribution is known, and a wrong rule misses it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import SAMPLERS, Denoiser, Level, Prediction, Schedule, default_levels, steps
from guidance import GuidanceError, classifier, generate, gradient_of, with_gradient
from models.classifier import Classifier, ClassifierConfig
from models.unet import UNetConfig
from tests.tiny import randomise, tiny_glide, tiny_model

MEAN, DEVIATION = 0.7, 0.5  # of the data, in every pixel
CLASS, SPREAD = -0.4, 0.6  # p(y | x_0) = exp(-(x_0 - CLASS)² / 2 SPREAD²), up to a constant
SCHEDULE = Schedule("squaredcos_cap_v2")
SAMPLES = 8192


def posterior(x_t: Tensor, alpha_bar: float) -> tuple[Tensor, float]:
    """Mean and variance of x_0 given x_t, for this data."""
    v, noise = DEVIATION**2, 1 - alpha_bar
    total = v * alpha_bar + noise
    return MEAN + v * alpha_bar**0.5 / total * (x_t - alpha_bar**0.5 * MEAN), v * noise / total


def denoise(x_t: Tensor, level: Level) -> Prediction:
    return Prediction.from_x0(x_t, posterior(x_t, level.alpha_bar)[0], level.alpha_bar)


def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
    """log p(y | x_t) = log of the mean of p(y | x_0) over p(x_0 | x_t): a Gaussian again, but for a constant."""
    mean, variance = posterior(x_t, SCHEDULE.alpha_bar(t[:1]).item())
    return (-((CLASS - mean) ** 2) / (2 * (variance + SPREAD**2))).flatten(1).sum(dim=1)


def drawn(sampler: str, denoiser: Denoiser) -> tuple[float, float]:
    """How far mean and variance of a chain of 1000 steps lie from the guided distribution's, in standard errors."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 32, 32, generator=g, dtype=torch.float64)
    for state in SAMPLERS[sampler](denoiser, x, default_levels(SCHEDULE, sampler, 1000), generator=g):
        x = state.x
    variance = 1 / (1 / DEVIATION**2 + 1 / SPREAD**2)
    mean = variance * (MEAN / DEVIATION**2 + CLASS / SPREAD**2)
    errors = (x.mean() - mean) / (variance / SAMPLES) ** 0.5, (x.var() / variance - 1) / (2 / SAMPLES) ** 0.5
    return tuple(error.abs().item() for error in errors)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_guided_chain_reaches_the_guided_distribution(sampler: str) -> None:
    """Three standard errors; what a thousand steps leave of the discretisation is about one of them."""
    mean, variance = drawn(sampler, with_gradient(denoise, gradient_of(log_probability, 1.0)))
    assert mean < 3
    assert variance < 3


def test_two_conditions_guide_together() -> None:
    """Each told half of the class's log-probability: their gradients are summed."""
    x_t, level, half = torch.randn(2, 1, 4, 4).double(), SCHEDULE.level(500), gradient_of(log_probability, 0.5)
    whole = with_gradient(denoise, gradient_of(log_probability, 1.0))(x_t, level)
    twice = with_gradient(with_gradient(denoise, half), half)(x_t, level)
    torch.testing.assert_close(twice.guide, whole.guide, rtol=1e-14, atol=0)            # float64's rounding


def unscaled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An ancestral step that forgets the Σ: the mean moves by the whole gradient."""

    def wrong(x_t: Tensor, prediction: Prediction, *rest: object) -> Tensor:
        return step(x_t, replace(prediction, guide=None), *rest) + prediction.guide

    return wrong


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("scale", [-1.0, 2.0])
def test_a_wrong_sign_and_a_doubled_scale_miss_it(sampler: str, scale: float) -> None:
    assert max(drawn(sampler, with_gradient(denoise, gradient_of(log_probability, scale)))) > 12


def test_a_missing_variance_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.samplers.ddpm_step", unscaled(steps.ddpm_step))
    assert not max(drawn("ddpm", with_gradient(denoise, gradient_of(log_probability, 1.0)))) < 12


def test_a_score_that_forgets_the_noise_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM's Σ is sqrt(1 - alpha_bar), in eps."""

    def wrong(self: Prediction, x_t: Tensor, level: Level) -> Prediction:
        eps = self.eps - self.guide
        return replace(self, x0=Prediction.from_eps(x_t, eps, level.alpha_bar).x0, eps=eps, guide=None)

    monkeypatch.setattr(Prediction, "guided", wrong)
    assert not max(drawn("ddim", with_gradient(denoise, gradient_of(log_probability, 1.0)))) < 12


def tiny_classifier(channels: int = 3, size: int = 16) -> Classifier:
    """Five classes."""
    torch.manual_seed(0)
    config = UNetConfig(channels, 5, 32, (1, 2), 1, (2,), None, 16, attention="self_legacy", scale_shift=True)
    network = Classifier(ClassifierConfig(config, size))
    randomise(network)
    return network


def test_the_gradient_is_that_of_the_class_s_log_probability() -> None:
    network, x = tiny_classifier(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gradient = classifier(network, [3, 1], 2.0)(x, Level(300.0, 0.5))

    def chosen(x_t: Tensor) -> Tensor:
        return network(x_t, torch.tensor([300, 300])).log_softmax(dim=1)[torch.arange(2), [3, 1]]

    with torch.inference_mode():
        assert torch.equal(classifier(network, [3, 1], 2.0)(x, Level(300.0, 0.5)), gradient)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rise = (chosen(x + 1e-2 * direction) - chosen(x - 1e-2 * direction)) / 2e-2     # central: third order
    torch.testing.assert_close((gradient * direction).flatten(1).sum(dim=1), 2 * rise, rtol=2e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.* adds the gradient to the score")
@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral", "dpmpp_2m"])
def test_it_guides_every_family_and_every_sampler(make: Callable, sampler: str) -> None:
    """The guided drawings are likelier to be of the class, by the classifier that guided."""
    model = make()
    channels, height, _ = model.x0_shape(16, 16)
    network = tiny_classifier(channels, height)

    def probability(scale: float) -> Tensor:
        seen: list[Tensor] = []
        hook = network.register_forward_hook(lambda _, given, out: seen.append(out.detach().softmax(dim=1)[:, 2]))
        generate(
            model, ["a dog", "a cat"], scale=2.0, steps=8, sampler=sampler, generator=0,
            guidance=classifier(network, [2, 2], scale),
        )  # fmt: skip
        hook.remove()
        return seen[-1].mean()

    assert probability(20.0) > probability(1e-6)


def test_a_score_guided_where_next_to_nothing_is_image_is_warned_of() -> None:
    """The cosine schedule's alpha_bar at time 999 is 2.4e-9 (Nichol & Dhariwal 2021, equation 17)."""
    options = {"guidance": gradient_of(lambda x, t: x.flatten(1).sum(dim=1), 1.0), "generator": 0}
    with pytest.warns(UserWarning, match="euler adds the gradient .*alpha_bar 2e-09, .* 20291 times") as caught:
        generate(tiny_glide(), "a dog", sampler="euler", steps=2, **options)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tiny_glide(), "a dog", sampler="ddim", steps="ddim25", **options)
        generate(tiny_glide(), "a dog", sampler="ddpm", steps=2, **options)
        generate(tiny_model(), "a dog", sampler="ddim", steps=2, **options)        # Stable Diffusion's least is 5e-3
        # 4e-5 of the linear one is what ImageNet's classifiers guide DDIM from (Dhariwal & Nichol 2021, table 5)
        linear = replace(tiny_glide(), schedule={"name": "linear"})
        generate(linear, "a dog", sampler="ddim", steps="ddim25", **options)
        generate(linear, "a dog", sampler="ddim", steps=2, **options)
        generate(linear, "a dog", sampler="euler", steps=2, **options)


def test_a_gradient_may_be_an_object_that_knows_its_classes() -> None:
    @dataclass
    class Towards:
        classes: list[int]

        def __call__(self, x_t: Tensor, level: Level) -> Tensor:
            return torch.zeros_like(x_t)

    assert generate(tiny_glide(), "a dog", steps=2, guidance=Towards([2])).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("classes", "scale", "said"),
    [([5], 1.0, "class 5 .* 0 to 4"), ([-1], 1.0, "class -1"), ([], 1.0, "no class"), ([0], float("nan"), "finite")],
)
def test_what_cannot_guide_is_refused(classes: list[int], scale: float, said: str) -> None:
    with pytest.raises(GuidanceError, match=said):
        classifier(tiny_classifier(), classes, scale)


def test_a_classifier_of_other_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reads images \(3, 32, 32\), these are \(3, 16, 16\)"):
        generate(tiny_glide(), "a dog", steps=2, guidance=classifier(tiny_classifier(size=32), [0], 1.0))
    with pytest.raises(GuidanceError, match="2 classes for 1 image"):
        generate(tiny_glide(), "a dog", steps=2, guidance=classifier(tiny_classifier(), [0, 1], 1.0))


@pytest.mark.parametrize(("factor", "said"), [(0.0, "is zero"), (float("inf"), "is not finite")])
def test_a_gradient_that_says_nothing_is_pointed_out_once(factor: float, said: str) -> None:
    gradient = gradient_of(lambda x, t: (factor * x).flatten(1).sum(dim=1), 1.0)
    with pytest.warns(UserWarning, match=f"{said} at time 999") as caught:
        drawn = generate(tiny_glide(), "a dog", steps=3, guidance=gradient, generator=0)
    assert len(caught) == 1
    plain = generate(tiny_glide(), "a dog", steps=3, generator=0)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-6)              # float32: 0 is added


def test_one_image_s_trouble_is_its_own() -> None:
    """Of three images the first has a gradient without end and the second none: the third is guided all the same."""
    factors = torch.tensor([float("inf"), 0.0, 1.0])
    gradient = gradient_of(lambda x, t: factors * x.sum(dim=(1, 2, 3)), 2.0)
    with pytest.warns(UserWarning, match="the gradient that should guide") as said:
        found = gradient(torch.ones(3, 1, 2, 2), Level(7.0, 0.5))
    assert torch.equal(found, torch.tensor([0.0, 0.0, 2.0])[:, None, None, None].expand(3, 1, 2, 2))
    assert [str(each.message).split(" at time")[0] for each in said] == [
        "the gradient that should guide is not finite", "the gradient that should guide is zero",
    ]  # fmt: skip


@pytest.mark.parametrize("learns", [False, True])
def test_a_score_that_does_not_look_at_the_image_guides_nowhere(learns: bool) -> None:
    """Nor does one that has a gradient by a network's weights alone."""
    gradient = gradient_of(lambda x, t: torch.zeros(len(x), requires_grad=learns) + 1, 1.0)
    with pytest.warns(UserWarning, match="is zero"):
        assert not gradient(torch.ones(2, 1, 2, 2), Level(7.0, 0.5)).any()


@pytest.mark.parametrize(("score", "said"), [(None, "a NoneType"), (torch.zeros(()), r"a tensor \(\)")])
def test_a_score_that_is_none_is_refused(score: object, said: str) -> None:
    with pytest.raises(GuidanceError, match=f"a number an image, not {said}"):
        gradient_of(lambda x, t: score, 1.0)(torch.ones(2, 1, 2, 2), Level(7.0, 0.5))


def test_classes_are_numbers_of_any_make() -> None:
    network, x, level = tiny_classifier(), torch.ones(2, 3, 16, 16), Level(7.0, 0.5)
    wanted = classifier(network, [1, 2], 1.0)(x, level)
    for asked in (torch.tensor([1, 2]), [np.int64(1), np.int64(2)]):
        assert torch.equal(classifier(network, asked, 1.0)(x, level), wanted)


@pytest.mark.parametrize("base", [object, torch.nn.Module])
def test_a_classifier_is_anything_that_has_classes_and_gives_logits(base: type) -> None:
    """A function, an ensemble, a module without weights of its own."""

    def logits(self: object, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.flatten(1)[:, :3]

    network, x = type("Plain", (base,), {"classes": 3, "__call__": logits})(), torch.randn(2, 3, 4, 4)
    gradient = classifier(network, [2, 0], 1.0)(x, Level(7.0, 0.5)).flatten(1)
    wanted = torch.eye(3)[[2, 0]] - x.flatten(1)[:, :3].softmax(dim=1)      # of log softmax
    torch.testing.assert_close(gradient[:, :3], wanted, rtol=0, atol=1e-6)
    assert not gradient[:, 3:].any()


@pytest.mark.parametrize("asked", [3, "heart", None, torch.tensor(3)])
def test_classes_that_are_no_list_are_refused(asked: object) -> None:
    with pytest.raises(GuidanceError, match="classes are one an image"):
        classifier(tiny_classifier(), asked, 1.0)


def test_what_draws_is_no_classifier_and_the_reverse() -> None:
    with pytest.raises(GuidanceError, match="a UNet is no classifier.*load_classifier"):
        classifier(tiny_model().unet, [1], 1.0)
    with pytest.raises(GuidanceError, match=r"a Classifier draws nothing.*models\.load"):
        generate(tiny_classifier(), ["1"])


def test_a_guide_that_throws_the_picture_out_of_its_range_is_an_error() -> None:
    with pytest.raises(GuidanceError, match="not finite.*smaller guidance scale"):
        generate(tiny_model(), ["dog"], steps=3, generator=0, guidance=lambda x, level: torch.full_like(x, 3e38))


@pytest.mark.parametrize(
    ("gradient", "said"),
    [
        (lambda x, t: -(x**2).flatten(1).sum(dim=1), r"a tensor \(1,\): of a log-probability"),  # would be broadcast
        (lambda x, t: None, "a NoneType"),                                                        # would be no guide
    ],
)
def test_what_is_no_gradient_does_not_guide_in_silence(gradient: Callable, said: str) -> None:
    with pytest.raises(GuidanceError, match=said):
        generate(tiny_model(), "dog", steps=2, generator=0, guidance=gradient)


def test_a_network_is_no_gradient() -> None:
    with pytest.raises(GuidanceError, match=r"guidance\.classifier or the like, not a Classifier"):
        generate(tiny_model(), "dog", steps=2, guidance=tiny_classifier())
