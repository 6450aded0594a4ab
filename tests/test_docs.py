"""The programs of docs/change_one_thing.md run as they stand, and do what is said of them."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from diffusion import SAMPLERS, Level, Prediction, Schedule, default_levels, euler, last
from guidance import generate
from inversion.concept import Concept
from inversion.objective import Batch, denoising_loss
from tests.tiny import tiny_glide, tiny_model

ROOT = Path(__file__).parents[1]
MEAN, DEVIATION = 0.3, 0.5                                      # of the data of an exact denoiser


def programs() -> list[str]:
    page = (ROOT / "docs/change_one_thing.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the page's programs leave."""
    folder, names, samplers = tmp_path_factory.mktemp("page"), {}, dict(SAMPLERS)
    (folder / "inversion").symlink_to(ROOT / "inversion")       # it is run from the project's root, and writes there
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program in programs():
            exec(compile(program, "change_one_thing.md", "exec"), names)
    names["model"].unet.load_state_dict(models.load("emoji").unet.state_dict())     # as it was when all but the end ran
    yield names
    SAMPLERS.clear()
    SAMPLERS.update(samplers)


def near(a: Tensor, b: Tensor) -> None:
    # float32, in another order of additions: 5e-6 apart after 30 steps
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def constant(value: float) -> Callable[[Tensor, Level], Prediction]:
    """A denoiser that has one answer, with x_0 of a deviation."""
    x0 = value * torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    return lambda x_t, level: Prediction.from_x0(x_t, x0, level.alpha_bar)


def exact(x_t: Tensor, level: Level, mean: float = MEAN) -> Prediction:
    """Of Gaussian data."""
    a, s2 = level.alpha_bar, DEVIATION**2
    x0 = mean + a**0.5 * s2 / (a * s2 + 1 - a) * (x_t - a**0.5 * mean)
    return Prediction.from_x0(x_t, x0, a)


def test_drawing_laid_open_is_generate(page: dict[str, Any]) -> None:
    near(page["picture"], generate(page["model"], "a red apple", generator=0))


@pytest.mark.parametrize("of_pixels", [False, True])
def test_another_model_takes_its_place(of_pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that predicts v from pure noise on, and one of pixels, but for what the page says that they lack."""
    model = tiny_glide() if of_pixels else tiny_model(prediction="v_prediction")
    if not of_pixels:
        model.schedule |= {"zero_terminal_snr": True}
    # where alpha_bar is 0 there is no score for a gradient to be added to
    lacks = ["get_submodule", "gradient_of", "sheet("] + of_pixels * ["attn2", "LowRank"]
    monkeypatch.setattr(models, "load", lambda name: model)
    monkeypatch.setitem(SAMPLERS, "heun", None)                 # what is there afterwards is what was before
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for program in programs():
        if not any(word in program for word in lacks):
            exec(compile(program, "change_one_thing.md", "exec"), names)
    drawn = [names[name] for name in ("picture", "ten_steps", "in_the_middle", "less_contrast", "both", "pictures")]
    assert all(bool(each.isfinite().all()) for each in drawn)
    learned = [names[name] for name in ("losses", "weighted", "masked")]
    assert all(math.isfinite(loss) for losses in learned for loss in losses)


def test_guidance_within_all_levels_and_within_none(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page, "apple", constant(1.0))
    monkeypatch.setitem(page, "nothing", constant(0.2))
    x, level = torch.randn(1, 4, 8, 8), Schedule("linear").level(300)
    for low, high, wanted in ((0, level.sigma, 3.4), (level.sigma, math.inf, 3.4), (0, 0.9 * level.sigma, 1.0)):
        near(page["within"](low, high, scale=4.0)(x, level).x0, constant(wanted)(x, level).x0)


def test_rescaling_brings_the_deviation_back(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page, "apple", constant(1.0))
    monkeypatch.setitem(page, "nothing", constant(0.2))
    x, level = torch.randn(1, 4, 8, 8), Schedule("linear").level(300)
    for phi, wanted in ((0.0, 3.4), (1.0, 1.0), (0.5, 2.2)):
        near(page["rescaled"](4.0, phi)(x, level).x0, constant(wanted)(x, level).x0)


def test_two_prompts_add_what_each_differs_by(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page, "nothing", constant(0.2))
    x, level = torch.randn(1, 4, 8, 8), Schedule("linear").level(300)
    both = page["composed"]({constant(1.0): 2.0, constant(0.5): 3.0})(x, level)
    near(both.x0, constant(0.2 + 2 * 0.8 + 3 * 0.3)(x, level).x0)


def test_heun_is_of_second_order(page: dict[str, Any]) -> None:
    """On Gaussian data, whose chain has a closed form: the distance to the mean shrinks as the deviation does."""
    schedule = Schedule("scaled_linear")
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)

    def error(sampler: Callable[..., Any], steps: int) -> float:
        levels = [schedule.level(t) for t in torch.linspace(900, 100, steps + 1).tolist()]
        first, end = (level.alpha_bar for level in (levels[0], levels[-1]))
        shrinks = ((end * DEVIATION**2 + 1 - end) / (first * DEVIATION**2 + 1 - first)) ** 0.5
        wanted = end**0.5 * MEAN + shrinks * (x - first**0.5 * MEAN)
        return (last(sampler(exact, x, levels)) - wanted).abs().max().item()

    # halved steps: a half of Euler's error, a quarter of Heun's, but for what is of higher order
    assert error(euler, 40) / error(euler, 80) == pytest.approx(2, rel=0.1)
    assert error(page["heun"], 40) / error(page["heun"], 80) == pytest.approx(4, rel=0.1)


def test_heun_goes_where_a_gradient_pulls(page: dict[str, Any]) -> None:
    """From the score of one Gaussian to that of another, which it then draws."""
    def other(x_t: Tensor, level: Level) -> Prediction:
        return exact(x_t, level, mean=-0.6)

    def pulled(x_t: Tensor, level: Level) -> Prediction:
        prediction = exact(x_t, level)
        guide = (prediction.eps - other(x_t, level).eps) / (1 - level.alpha_bar) ** 0.5     # score: -eps / sqrt(1 - a)
        return replace(prediction, guide=guide)

    x, levels = torch.randn(1, 1, 4, 4, dtype=torch.float64), default_levels(Schedule("scaled_linear"), "heun", 8)
    found, wanted, astray = (last(page["heun"](denoise, x, levels)) for denoise in (pulled, other, exact))
    near(found, wanted)
    assert (astray - wanted).abs().max() > 0.5                          # of means that are 0.9 apart


def test_heun_is_drawn_by_its_name(page: dict[str, Any]) -> None:
    levels = default_levels(page["schedule"], "heun", 15)
    guided = page["classifier_free"](page["apple"], page["nothing"], 5.0)
    for seed, picture in enumerate(generate(page["model"], ["a red apple"] * 2, sampler="heun", steps=15, generator=0)):
        near(page["drawn"](guided, levels, page["heun"], seed)[0], picture)


def test_the_gradient_of_an_image_makes_it_bluer(page: dict[str, Any]) -> None:
    far = [(each.mean((2, 3)) - page["blue"]).norm().item() for each in (page["picture"], page["blue_apple"])]
    assert far[1] < 0.8 * far[0]                                # 2.23 and 1.47 of at most 2 sqrt(3)


def test_distillation_ends_at_the_one_image_that_there_is(page: dict[str, Any]) -> None:
    wanted = torch.full((1, *page["shape"]), 0.7)
    found = page["distilled"](lambda x_t, level: Prediction.from_x0(x_t, wanted, level.alpha_bar), steps=200)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)     # Adam's steps of 0.1 swing, and swing less


def test_where_a_word_is_read(page: dict[str, Any]) -> None:
    """The probabilities that were had from queries and keys are those by which the layer itself reads."""
    layer, seen = page["attention"], []
    hook = layer.register_forward_hook(lambda _, inputs, y: seen.append((inputs[1], y)))
    page["drawn"](page["apple"])
    hook.remove()
    context, y = seen[-1]
    v = layer.to_v(context).unflatten(-1, (layer.heads, -1)).transpose(1, 2)                # (B, H, L, d)
    assert page["probabilities"].shape[-1] == context.shape[1]
    near(layer.to_out((page["probabilities"] @ v).transpose(1, 2).flatten(2)), y)


def test_a_forward_derivative_is_that_of_differences(page: dict[str, Any]) -> None:
    x_t, v, level, h = page["x_t"], page["v"], page["schedule"].level(500), 3e-3
    with torch.no_grad():
        ahead, behind = (page["apple"](x_t + sign * h * v, level).eps for sign in (1, -1))
    found, wanted = page["along_v"], (ahead - behind) / (2 * h)
    assert (found - wanted).norm() < 0.01 * wanted.norm()           # float32, by differences: 2e-4


def test_learning_laid_open_has_the_loss_and_gradient_of_train(page: dict[str, Any]) -> None:
    """Of its first step. AdamW's first step is the gradient's sign times the rate."""
    concept, prompts = page["concept"], page["prompts"]
    generator, size = torch.Generator().manual_seed(0), len(prompts)
    draw, noise = torch.randn(2, size, *page["shape"], generator=generator)
    t = torch.randint(1000, (size,), generator=generator)
    batch = Batch(page["moments"], [prompt.replace("<poodle>", "{}") for prompt in prompts], t, draw, noise)
    ours = Concept("<poodle>", concept.vectors.clone().requires_grad_())
    loss = denoising_loss(page["model"], page["schedule"], batch, "<poodle>", ours).mean()
    assert page["losses"][0] == pytest.approx(loss.item(), rel=1e-5)
    moved = concept.vectors.clone()
    page["learn"](moved, steps=1)
    (gradient,) = torch.autograd.grad(loss, ours.vectors)
    large = gradient.abs() > 1e-3 * gradient.abs().max()        # not where the sign is rounding's
    assert torch.equal((concept.vectors - moved).sign()[large], gradient.sign()[large])


def test_what_is_learned_besides_begins_at_the_plain_loss(page: dict[str, Any]) -> None:
    for name in ("losses_of_each", "losses_with_thin"):
        assert page[name][0] == pytest.approx(page["losses"][0], rel=1e-5), name
        assert sum(page[name]) < sum(page["losses"]), name      # more numbers learn more in as many steps


def test_each_layer_learned_a_vector_of_its_own(page: dict[str, Any]) -> None:
    assert len(page["vector_of_each"].unique(dim=0)) == len(page["layers"])


def test_an_error_where_the_subject_is(page: dict[str, Any]) -> None:
    """Nothing of the ground; and an error that is the same everywhere is the same here, however large the subject."""
    output, wanted, subject = torch.zeros(4, *page["shape"]), torch.ones(4, *page["shape"]), page["subject"]
    t = torch.zeros(4, dtype=torch.int64)
    assert 0 < subject.mean() < 1
    elsewhere = wanted + 100 * (subject == 0)
    torch.testing.assert_close(page["where_it_is"](output, elsewhere, t), page["where_it_is"](output, wanted, t))
    torch.testing.assert_close(page["where_it_is"](output, wanted, t), torch.ones(4))


def test_a_thin_matrix_is_folded_into_its_layer(page: dict[str, Any]) -> None:
    layer = torch.nn.Linear(6, 5, bias=False)
    beside, x = page["LowRank"](layer, rank=2), torch.randn(3, 6)
    torch.nn.init.normal_(beside.up)
    before = beside(x)
    with torch.no_grad():
        layer.weight += beside.up @ beside.down
    torch.testing.assert_close(layer(x), before)
    assert all(type(each.to_v) is type(page["attention"].to_q) for each in page["layers"])
