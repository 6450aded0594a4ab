"""Classifier-free guidance of Gaussians, whose answer is known: guided means extrapolate. In float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion import Denoiser, Level, Prediction, Schedule
from guidance import GuidanceError, bind, classifier_free, classifier_free_pair, with_gradient

LEVEL = Schedule("scaled_linear").level(600)
EXACT = 1e-12  # float64 rounding


def gaussian(mean: float | Tensor, calls: list[int] | None = None) -> Denoiser:
    """The exact denoiser of N(mean, 0.5²)."""

    def denoise(x_t: Tensor, level: Level) -> Prediction:
        if calls is not None:
            calls.append(len(x_t))
        a = level.alpha_bar
        x0 = mean + 0.25 * a**0.5 / (0.25 * a + 1 - a) * (x_t - a**0.5 * mean)
        return Prediction.from_x0(x_t, x0, a)

    return denoise


def x_t(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 7.5])
def test_guided_gaussians_are_a_gaussian(scale: float) -> None:
    """Of two normals with one variance, guidance makes the normal whose mean is null + scale
    (conditional - null)."""
    expected = gaussian(-0.5 + scale * (0.8 - -0.5))(x_t(), LEVEL)
    one_by_one = classifier_free(gaussian(0.8), gaussian(-0.5), scale)(x_t(), LEVEL)
    means = torch.tensor([-0.5, -0.5, 0.8, 0.8], dtype=torch.float64).reshape(4, 1, 1, 1)
    in_one_pass = classifier_free_pair(gaussian(means), scale)(x_t(), LEVEL)
    for guided in (one_by_one, in_one_pass):
        torch.testing.assert_close(guided.x0, expected.x0, rtol=0, atol=EXACT)
        torch.testing.assert_close(guided.eps, expected.eps, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("scale", "asked"), [(0, (0, 1)), (1, (1, 0)), (2, (1, 1))])
def test_only_what_counts_is_asked(scale: float, asked: tuple[int, int]) -> None:
    conditional: list[int] = []
    null: list[int] = []
    classifier_free(gaussian(0.8, conditional), gaussian(-0.5, null), scale)(x_t(), LEVEL)
    assert (len(conditional), len(null)) == asked


def test_a_scale_is_one_number() -> None:
    scales = torch.tensor([3.0, 5.0]).view(2, 1, 1, 1)
    with pytest.raises(GuidanceError, match="a guidance scale is one number"):
        classifier_free(gaussian(0.8), gaussian(-0.5), scales)
    one = torch.tensor(3.0, dtype=torch.float64)
    found, wanted = (classifier_free(gaussian(0.8), gaussian(-0.5), s)(x_t(), LEVEL).x0 for s in (one, 3.0))
    assert torch.equal(found, wanted)


def test_a_gradient_of_the_null_prediction_alone_is_refused() -> None:
    """It was dropped."""
    steered = with_gradient(gaussian(-0.5), lambda x, level: torch.ones_like(x))
    with pytest.raises(GuidanceError, match="a gradient guides the null prediction alone"):
        classifier_free(gaussian(0.8), steered, 3.0)(x_t(), LEVEL)
    guided = classifier_free(steered, gaussian(0.8), 3.0)(x_t(), LEVEL)
    assert torch.equal(guided.guide, torch.ones_like(x_t()))


def test_a_network_is_told_its_time_whatever_the_default_dtype_is() -> None:
    """bfloat16 has no 501."""
    told: list[Tensor] = []

    class Asked:
        prediction = "epsilon"

        def predict(self, x_t: Tensor, t: Tensor, features: None) -> Tensor:
            told.append(t)
            return x_t

    torch.set_default_dtype(torch.bfloat16)
    try:
        bind(Asked(), None)(x_t(1), Schedule("scaled_linear").level(501))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.tolist() for t in told] == [[501.0]]


def test_the_pair_is_one_pass() -> None:
    calls: list[int] = []
    classifier_free_pair(gaussian(0.0, calls), 3.0)(x_t(2), LEVEL)
    assert calls == [4]


def test_what_is_guided_of_clipped_halves_is_not_clipped() -> None:
    def bright(x_t: Tensor, level: Level) -> Prediction:
        return gaussian(torch.linspace(-1, 5, len(x_t)).view(-1, 1, 1, 1))(x_t, level).clamped(x_t, level)

    prediction = classifier_free_pair(bright, 3.0)(x_t(), LEVEL)
    assert prediction.x0.max() > 1
    assert not prediction.clipped


def test_variance_and_guide_are_the_conditional_ones() -> None:
    def labelled(x: Tensor, level: Level) -> Prediction:
        rows = torch.arange(len(x), dtype=x.dtype).reshape(-1, 1, 1, 1).expand_as(x)
        return replace(gaussian(0.0)(x, level), var_frac=rows, guide=10 * rows)

    guided = classifier_free_pair(labelled, 3.0)(x_t(2), LEVEL)
    assert guided.var_frac[:, 0, 0, 0].tolist() == [2, 3]
    assert guided.guide[:, 0, 0, 0].tolist() == [20, 30]


@pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
def test_bind(form: str) -> None:
    class Model:
        prediction = form

        def predict(self, x: Tensor, t: Tensor, features: str) -> Tensor:
            assert features == "features"
            assert t.tolist() == [600.0, 600.0]
            prediction = gaussian(0.4)(x, LEVEL)
            a = LEVEL.alpha_bar
            return (
                prediction.eps
                if form == "epsilon"
                else a**0.5 * prediction.eps - (1 - a) ** 0.5 * prediction.x0
            )

    bound = bind(Model(), "features")(x_t(), LEVEL)
    torch.testing.assert_close(bound.x0, gaussian(0.4)(x_t(), LEVEL).x0, rtol=0, atol=EXACT)
    torch.testing.assert_close(bound.eps, gaussian(0.4)(x_t(), LEVEL).eps, rtol=0, atol=EXACT)
