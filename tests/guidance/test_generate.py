"""`generate` over a model that is known exactly: the prompt is a number, and all pictures of it are that
colour.

The network is the exact denoiser of N(number, deviation²) in every pixel, the VAE is the identity, and a
concept's vector holds the number that its placeholder stands for.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion import SAMPLERS, DiffusionError, Schedule, default_levels
from guidance import GuidanceError, generate
from guidance.inputs import _whole, warn_of_words
from inversion import Concept
from models.tokenizer import placeholder_pattern
from models.unet_model import Sampling
from tests.tiny import tiny_model

EXACT = 2e-5  # float32, times up to 1 / sqrt(alpha_bar) = 15 at the first level


@dataclass
class Word:
    placeholder: str
    vectors: Tensor


class Tokenizer:
    def encode(self, texts: list[str], placeholders: dict[str, int]) -> list[list[str | int]]:
        starts = dict(zip(placeholders, [0, *torch.tensor(list(placeholders.values())).cumsum(0).tolist()]))
        return [[starts.get(word, word) for word in text.split()] for text in texts]


@dataclass
class Model:
    """What `guidance.Model` asks for; `asked` keeps (time, batch) of every question, `first` the first
    x_t."""

    deviation: float = 0.0
    prediction: str = "v_prediction"
    schedule: dict = field(default_factory=lambda: {"name": "scaled_linear"})
    resolution: int = 16
    width: int = 1
    device: torch.device = torch.device("cpu")
    sampling: Sampling = Sampling("ddim", 50, 7.5)
    pixels: bool = False
    factor: int = 1
    family: str = "exact"
    upsampler: None = None
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    asked: list[tuple[float, int]] = field(default_factory=list)
    first: Tensor | None = None

    def encode_text(self, tokens: list[list[str | int]], extra: Tensor | None = None) -> Tensor:
        def number(word: str | int) -> float:
            return float(word) if isinstance(word, str) else extra[word].item()

        return torch.tensor([sum(number(word) for word in words) for words in tokens]).reshape(-1, 1, 1, 1)

    def predict(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(features)
        assert not torch.is_grad_enabled()
        self.asked.append((t[0].item(), len(t)))
        self.first = x_t if self.first is None else self.first
        a, s2 = Schedule(**self.schedule).level(t[0].item()).alpha_bar, self.deviation**2
        x0 = features + s2 * a**0.5 / (s2 * a + 1 - a) * (x_t - a**0.5 * features)
        eps = (x_t - a**0.5 * x0) / (1 - a) ** 0.5
        return eps if self.prediction == "epsilon" else a**0.5 * eps - (1 - a) ** 0.5 * x0

    def moments(self, images: Tensor) -> Tensor:
        return torch.cat([images, images * 0], dim=1)

    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0] + 0.01 * noise

    def decode(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1)

    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width


def normal(seed: int, draws: int = 1) -> Tensor:
    """The last of so many draws of an image's stream: (3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 16, 16, generator=generator) for _ in range(draws)][-1]


def expected_at_end(colour: float, sampler: str, steps: int, seed: int) -> Tensor:
    """DDIM and PLMS stop at alpha_bar_0, as Stable Diffusion has it, where a part of the start's eps
    remains."""
    first, *_, end = default_levels(Schedule("scaled_linear"), sampler, steps)
    eps = (normal(seed) - first.alpha_bar**0.5 * colour) / (1 - first.alpha_bar) ** 0.5
    return end.alpha_bar**0.5 * colour + (1 - end.alpha_bar) ** 0.5 * eps


@pytest.mark.filterwarnings("ignore:a guidance scale of 1 is off")
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpmpp_2m_karras"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_draws_the_guided_colour(sampler: str, scale: float, prediction: str) -> None:
    """At deviation 0 every step is exact: the colour is negative + scale (prompt - negative)."""
    model = Model(prediction=prediction)
    images = generate(
        model, ["0.25", "-0.1"], negative=["0.1", "0.05"], scale=scale, sampler=sampler, steps=6, generator=0
    )
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    for seed, (image, prompt, negative) in enumerate(zip(images, (0.25, -0.1), (0.1, 0.05))):
        expected = expected_at_end(negative + scale * (prompt - negative), sampler, 6, seed)
        torch.testing.assert_close(image, expected, rtol=0, atol=EXACT * max(scale, 1))


def test_zero_terminal_snr_starts_at_the_last_time() -> None:
    model = Model(schedule={"name": "scaled_linear", "zero_terminal_snr": True})
    image = generate(model, "0.4", negative="0.1", steps=4, generator=0)
    torch.testing.assert_close(
        image, torch.full_like(image, 0.1 + 7.5 * 0.3).clamp(max=1), rtol=0, atol=EXACT
    )
    assert model.asked[0][0] == 999


def test_what_is_not_said_is_as_the_model_likes_it() -> None:
    model = Model(0.5, sampling=Sampling("euler", 3, 2.0))
    usual = generate(model, "0.4", negative="0.1", generator=0)
    assert len(model.asked) == 3
    said = generate(Model(0.5), "0.4", negative="0.1", sampler="euler", steps=3, scale=2.0, generator=0)
    assert torch.equal(usual, said)
    without = generate(model, "0.4", negative="0.1", scale=0.0, generator=0)                   # 0 is said, too
    assert not torch.allclose(usual, without, atol=1e-2)


@pytest.mark.parametrize(("scale", "batch"), [(0.0, 2), (1.0, 2), (2.0, 4)])
def test_the_half_that_does_not_count_is_not_asked(scale: float, batch: int) -> None:
    model = Model()
    generate(model, ["0.1", "0.2"], scale=scale, steps=3, generator=0)
    assert [size for _, size in model.asked] == [batch] * 3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_is_the_same_in_any_batch(sampler: str) -> None:
    """Image i of seed s is what seed s + i draws alone, however the call is cut into batches."""
    prompts, negatives = ["0.1", "0.2", "0.3", "0.4", "0.5"], ["0", "0.1", "-0.1", "0.2", "-0.2"]
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 16, 16)
    options = {"generator": 7, "sampler": sampler, "steps": 4}
    for start in ({}, {"image": images}):
        together = generate(Model(0.5), prompts, negative=negatives, **start, **options)
        for batch_size in (1, 2):
            cut = generate(
                Model(0.5), prompts, negative=negatives, batch_size=batch_size, **start, **options
            )
            torch.testing.assert_close(cut, together, rtol=0, atol=1e-6)  # sums may go in another order
        third = {"negative": negatives[3]} | {name: image[3] for name, image in start.items()}
        alone = generate(Model(0.5), prompts[3], **third, **(options | {"generator": 10}))
        torch.testing.assert_close(alone[0], together[3], rtol=0, atol=1e-6)
    assert not torch.allclose(alone[0], generate(Model(0.5), prompts[3], **third, **options)[0], atol=1e-2)


def test_a_seed_for_each_image() -> None:
    options = {"negative": "0", "steps": 2}
    images = generate(Model(0.5), ["0.1"] * 3, generator=[4, 9, 4], **options)
    # 1e-6 here and below: float32, whose sums may go in another order in a batch of another size
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-6)
    nine = generate(Model(0.5), "0.1", generator=9, **options)[0]
    torch.testing.assert_close(images[1], nine, rtol=0, atol=1e-6)
    usual = {"strength": None, "progress": None, "concepts": {}.values(), "negative": np.array(["0"] * 3)}
    assert torch.equal(generate(Model(0.5), ["0.1"] * 3, generator=[4, 9, 4], **options | usual), images)
    of_numpy = generate(Model(0.5), ["0.1"] * 3, generator=list(np.array([4, 9, 4])), **options)
    assert torch.equal(of_numpy, images)


def test_a_generator_seeds_image_after_image() -> None:
    options = {"negative": "0", "steps": 2}
    three = generate(Model(0.5), ["0.1"] * 3, generator=torch.Generator().manual_seed(5), **options)
    two = generate(Model(0.5), ["0.1"] * 2, generator=torch.Generator().manual_seed(5), **options)
    torch.testing.assert_close(three[:2], two, rtol=0, atol=1e-6)
    torch.manual_seed(5)
    from_torch = generate(Model(0.5), ["0.1"] * 2, **options)
    torch.testing.assert_close(from_torch, two, rtol=0, atol=1e-6)
    assert not torch.allclose(from_torch, generate(Model(0.5), ["0.1"] * 2, **options), atol=1e-2)


def test_the_first_x_is_the_streams_first_draw() -> None:
    model = Model()
    generate(model, ["0.1", "0.2"], scale=1.0, steps=3, generator=20)
    assert torch.equal(model.first, torch.stack([normal(20), normal(21)]))


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmpp_2m"])
def test_image_to_image(sampler: str) -> None:
    """It starts from q(x_t | x_0) of the image at the level that int(10 · 0.35) = 3 steps before the end
    has."""
    model, image = Model(), 0.2 * torch.ones(3, 16, 16)
    drawn = generate(
        model, ["0.4"], scale=1.0, sampler=sampler, steps=10, image=image, strength=0.35, generator=3
    )
    levels = default_levels(Schedule("scaled_linear"), sampler, 10)
    assert [t for t, _ in model.asked] == pytest.approx([level.t for level in levels[7:10]])
    a = levels[7].alpha_bar
    expected = a**0.5 * (image + 0.01 * normal(3)) + (1 - a) ** 0.5 * normal(3, draws=2)
    torch.testing.assert_close(model.first[0], expected, rtol=0, atol=1e-6)  # float32, up to 4
    assert (drawn - 0.4).abs().max() < EXACT


def test_one_image_for_all_or_one_for_each() -> None:
    model, images = Model(), torch.stack([-torch.ones(3, 16, 24), torch.zeros(3, 16, 24)])
    options = {"scale": 1.0, "steps": 10, "strength": 0.1, "generator": 3}
    assert generate(model, ["0.4", "0.4"], image=images, **options).shape == (2, 3, 16, 24)
    assert model.first[1].mean() - model.first[0].mean() > 0.5
    model.first = None
    generate(model, ["0.4", "0.4"], image=images[1], height=16, width=24, **options)
    assert abs(model.first[1].mean() - model.first[0].mean()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_image_of_another_dtype_is_taken_in_float32(dtype: torch.dtype) -> None:
    model, first = Model(), []
    image = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    for start in (image, image.float()):
        model.first = None
        generate(model, "0.4", image=start, scale=1.0, steps=10, strength=0.5, generator=3)
        first.append(model.first)
    assert first[0].dtype == torch.float32
    assert torch.equal(*first)


def test_of_an_image_four_fifths_of_the_steps_are_drawn_anew() -> None:
    options = {"image": torch.zeros(3, 16, 16), "scale": 1.0, "steps": 10, "generator": 3}
    given = {}, {"strength": 0.8}, {"strength": 0.9}
    usual, said, other = (generate(Model(), "0.4", **options, **how) for how in given)
    assert torch.equal(usual, said)
    assert not torch.equal(usual, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_network_in_float64_draws_the_same_from_an_image(sampler: str) -> None:
    drawn = []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model()
        for network in model.networks().values():
            network.to(dtype)
        image = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)
        drawn.append(generate(model, "a dog", image=image, steps=4, strength=0.5, sampler=sampler, generator=0))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)       # float32, two steps; other noise would differ by 1


def test_an_image_of_numbers_from_0_to_1_is_warned_of() -> None:
    """As torchvision's ToTensor makes it: it would be drawn pale, and nothing said."""
    options = {"scale": 1.0, "steps": 4, "strength": 0.5, "generator": 3}
    with pytest.warns(UserWarning, match=r"darker than middle grey.* in \[0, 1\], give 2x - 1") as said:
        generate(Model(), "0.4", image=torch.rand(3, 16, 16), **options)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(Model(), "0.4", image=torch.ones(3, 16, 16), **options)            # a canvas, of one colour


def test_concepts_are_bound_in_order() -> None:
    words = [
        Word("<a>", torch.tensor([[0.3], [9.0]])),
        Word("<b>", torch.tensor([[-0.2]], requires_grad=True)),
    ]
    images = generate(
        Model(), ["<b>", "<a>"], negative="<b> 0.1", scale=2.0, sampler="euler", steps=3, concepts=words
    )
    for image, prompt in zip(images, (-0.2, 0.3)):
        assert (image - (-0.1 + 2 * (prompt + 0.1))).abs().max() < 2 * EXACT
    assert not images.requires_grad


def test_size() -> None:
    images = generate(Model(), "0.1", negative="0", steps=2, height=24, width=8)
    assert images.shape == (1, 3, 24, 8)


def test_progress_counts_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        Model(),
        ["0"] * 3,
        negative="0",
        steps=4,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 8) for i in range(1, 9)]
    assert capsys.readouterr().err == ""
    generate(Model(), ["0"] * 3, negative="0", steps=4, batch_size=2, progress=True)
    assert "8/8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"negative": ["0", "0"]}, "2 negative prompts for 1: give one, or as many"),
        ({"scale": float("nan")}, "a finite number .* not nan"),
        ({"scale": "3"}, "a finite number .* not '3'"),
        ({"prompts": None}, "prompts are texts; got None"),
        ({"height": "64"}, "height is a whole number, not '64'"),
        ({"width": 64.0}, "width is a whole number, not 64.0"),
        ({"batch_size": 2.5}, "batch_size is a whole number, not 2.5"),
        ({"batch_size": 0}, "at least one image, not 0"),
        ({"generator": -1}, "between 0 and 2.63, not at -1"),
        ({"generator": 2**63}, "between 0 and 2.63, not at 9223372036854775808"),
        ({"generator": [2**64]}, r"between 0 and 2.63, not at \[18446744073709551616\]"),
        ({"generator": [1, 2]}, "2 seeds for 1 images"),
        ({"generator": "5"}, "seeds are whole numbers, not '5'"),
        ({"generator": [None]}, r"seeds are whole numbers, not \[None\]"),
        ({"generator": [1.5]}, r"seeds are whole numbers, not \[1.5\]"),
        ({"batch_size": None}, "batch_size is a whole number, not None"),
        ({"guidance": 5}, "is one of guidance.classifier or the like, not 5"),
        ({"progress": 5}, "progress is True, False, or a function .* not 5"),
        ({"negative": 3}, "negative prompts are texts; got 3"),
        ({"negative": [3]}, r"negative prompts are texts; got \[3\]"),
        ({"concepts": None}, "a list of learned words, each an inversion.Concept, not None"),
        ({"concepts": ["<a>"]}, r"each an inversion.Concept, not \['<a>'\]"),
        (
            {"image": torch.zeros(1, 16, 16)},
            r"is \(3, H, W\), or \(1, 3, H, W\) for as many prompts, not \(1, 1, 16",
        ),
        ({"image": torch.zeros(2, 3, 16, 16)}, r"not \(2, 3, 16, 16\)"),
        ({"image": torch.full((3, 16, 16), 255)}, r"floats in \[-1, 1\], not int64 from 255 to 255"),
        ({"image": torch.full((3, 16, 16), 1.5)}, r"not float32 from 1.5 to 1.5"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, r"not float32 from nan to nan"),
        (
            {"image": torch.zeros(3, 16, 16), "width": 8},
            "the width asked for, 8, is not 16, .* an image of 16:",
        ),
        (
            {"concepts": [Word("<a>", torch.zeros(1, 768))]},
            r"vectors of <a> are \(1, 768\), .* \(n, 1\)",
        ),
        (
            {"concepts": [Concept("<a>", torch.zeros(1, 1), {"family": "other"})]},
            "learned with other, but this model's text encoder, exact",
        ),
        ({"concepts": [Word("<a>", torch.zeros(1, 1))] * 2}, r"one placeholder \(<a>, <a>\)"),
        ({"strength": 0.5}, "a strength, 0.5, .* and here it starts from noise: leave it out"),
    ],
)
def test_refused(options: dict, sentence: str) -> None:
    with pytest.raises(GuidanceError, match=sentence):
        generate(Model(), **({"prompts": "0.1", "negative": "0", "steps": 2} | options))


def test_a_learned_word_that_no_prompt_has_is_warned_of() -> None:
    word = Word("<a>", torch.zeros(1, 1))
    with pytest.warns(UserWarning, match="no prompt has <a>: a learned word is drawn where it is written") as warned:
        generate(Model(), "0.1", steps=2, concepts=[word])
    assert warned[0].filename == __file__
    for silent in ({"prompts": ["0.1", "<a>"]}, {"prompts": "0.1", "negative": "<a>"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(Model(), steps=2, concepts=[word], **silent)


def test_many_steps_that_begin_in_the_middle_are_warned_of() -> None:
    said = r"^501 steps of ddim begin at time 501 of 1000, where 5\d% of an image should be there, .*: take fewer, 50"
    with pytest.warns(UserWarning, match=said) as warned:
        generate(Model(), "0.1", steps=501, sampler="ddim")
    assert [each.filename for each in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(Model(), "0.1", steps=500, sampler="ddim")
        generate(Model(), "0.1", steps=501, sampler="euler")
        generate(Model(), "0.1", steps=501, sampler="ddim", image=torch.zeros(3, 16, 16))
        generate(Model(), "0.1", steps=3, sampler="ddim")                                       # a quick look


def test_a_word_that_nobody_learned_is_warned_of() -> None:
    word = Word("<a>", torch.zeros(1, 1))
    prompts = ["0.1 <b>", "<a> <c-d> <b>"]
    said = "^<b>, <c-d> is read as letters: if it is a learned word, give"
    with pytest.warns(UserWarning, match=said) as warned, pytest.raises(ValueError, match="string to float: '<b>'"):
        generate(Model(), prompts, steps=2, concepts=[word])            # this tokenizer knows numbers alone
    assert [each.filename for each in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_words([word], ["1 < 2 > 0", "<|endoftext|>", "<3", "a <a>'s", "<>"])


def test_a_word_within_another_is_not_the_learned_one() -> None:
    """No tokenizer sees it there."""
    frida = Word("frida", torch.zeros(1, 1))
    with pytest.warns(UserWarning, match="^no prompt has frida: "):
        warn_of_words([frida], ["a picture of fridas"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_words([frida], ["fridas", "frida's"])
        warn_of_words([], ["fridas"])


@given(st.lists(st.text("a <>-é", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=3), st.text("a <>-é"))
def test_learned_words_are_found_where_the_tokenizers_find_them(names: list[str], text: str) -> None:
    pattern = placeholder_pattern(dict.fromkeys(names, 1))
    assert _whole(names).findall(text) == pattern.split(text)[1::2]


def test_a_model_that_let_its_vae_go_is_refused_before_it_draws() -> None:
    model = Model()
    model.released = True
    with pytest.raises(GuidanceError, match="has left memory, .* train with keep_encoder=True"):
        generate(model, "0.1", steps=2, progress=lambda *_: pytest.fail("it drew"))


def test_a_number_of_numpy_s_is_a_number() -> None:
    given = {"scale": np.float32(3), "steps": np.int64(2), "generator": np.int64(4)}
    given |= {"height": np.int64(16), "batch_size": np.int64(2)}
    drawn = generate(Model(deviation=0.5), ["0.1"] * 2, **given)
    assert torch.equal(drawn, generate(Model(deviation=0.5), ["0.1"] * 2, scale=3.0, steps=2, generator=4))


def test_a_negative_prompt_without_guidance_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="scale of 1 is off, so the negative prompt does nothing") as warned:
        generate(Model(), "0.1", negative="0", steps=2, scale=1.0)
    assert warned[0].filename == __file__
    for silent in ({"negative": "0"}, {"negative": "0", "scale": 0.0}, {"negative": "", "scale": 1.0}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(Model(), "0.1", steps=2, **silent)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": "heun"}, "no sampler is called 'heun'; there are ddpm, ddim"),
        ({"sampler": ["ddim"]}, r"no sampler is called \['ddim'\]"),
        ({"steps": 0}, "0 steps do not fit a schedule of 1000: take between 1 and 1000"),
        (
            {"steps": 2, "image": torch.zeros(3, 16, 16), "strength": 0.4},
            "leaves none of 2 steps: take at least 3",
        ),
        ({"image": torch.zeros(3, 16, 16), "strength": 1.4}, "a number above 0 and at most 1, not 1.4"),
        ({"image": torch.zeros(3, 16, 16), "strength": "a"}, "a number above 0 and at most 1, not 'a'"),
        (
            {"schedule": {"name": "scaled_linear", "zero_terminal_snr": True}, "prediction": "epsilon"},
            "needs a network that predicts v",
        ),
    ],
)
def test_refused_by_the_process(options: dict, sentence: str) -> None:
    fields = {name: options.pop(name) for name in ("schedule", "prediction") if name in options}
    with pytest.raises(DiffusionError, match=sentence):
        generate(Model(**fields), **({"prompts": "0.1", "negative": "0"} | options))


def test_halves_of_guidance_share_what_no_text_was_told_unless_they_are_not_to() -> None:
    """Who looks for both halves in every layer, as attention that is guided by itself does, turns it off."""
    model, rows = tiny_model(), []
    for name, layer in model.unet.named_modules():
        if name.endswith("attn1"):
            layer.register_forward_hook(lambda layer, inputs, y: rows.append(len(y)))
    shared = generate(model, ["a dog", "a cat"], steps=1, sampler="ddim", generator=0)
    assert rows[0] == 2
    assert set(rows[1:]) == {4}
    model.shares = False
    rows.clear()
    drawn = generate(model, ["a dog", "a cat"], steps=1, sampler="ddim", generator=0)
    assert set(rows) == {4}
    torch.testing.assert_close(drawn, shared, rtol=0, atol=1e-4)            # float32: products of other sizes
