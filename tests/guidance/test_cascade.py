"""`generate` with GLIDE: an upsampler after the base, what is kept of an image, CLIP's gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from diffusion import Level, Prediction, Schedule
from guidance import GuidanceError, clip_gradient, generate, gradient_of, inputs, pictures
from guidance.chain import keeping
from guidance.generate import levels_of
from inversion import Concept
from models.noisy_clip import NoisyClip, NoisyClipConfig
from models.pixels import GivenImages
from tests.tiny import randomise, tiny_glide, tiny_model


def picture(size: int, seed: int = 0) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_base_draws_as_the_notebook_does() -> None:
    """100 evenly spaced ancestral steps, both ends of 1000 among them, with the learned variance; fast27 above."""
    model = tiny_glide()
    times = [level.t for level in levels_of(model, "ddpm", "100")]
    assert (times[0], times[-2], times[-1], len(times)) == (999, 0, -1, 101)
    assert len(levels_of(tiny_glide(factor=4), "ddim", "fast27")) == 28
    assert generate(model, "a dog", steps=3, generator=0).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="is no spacing"):
        generate(model, "a dog", steps="many")


def test_inpainting_is_drawn_as_its_own_notebook_does() -> None:
    """text2im.ipynb and inpaint.ipynb of openai/glide-text2im at 69b5307 differ: the one upsampler is ancestral."""
    found = [tiny_glide(factor=factor, inpaints=inpaints).sampling for inpaints in (False, True) for factor in (1, 4)]
    assert found == [
        ("ddpm", "100", 3.0, 1.0), ("ddim", "fast27", 1.0, 0.997),
        ("ddpm", "100", 5.0, 1.0), ("ddpm", "fast27", 1.0, 0.997),
    ]  # fmt: skip


def test_the_variance_that_the_network_learned_is_used() -> None:
    def drawn(raw_variance: float) -> Tensor:
        model = tiny_glide()
        model.unet.out[2].weight.data[3:], model.unet.out[2].bias.data[3:] = 0, raw_variance
        return generate(model, "a dog", steps=3, scale=1.0, generator=0)

    assert not torch.allclose(drawn(-1.0), drawn(1.0), atol=1e-3)
    ddim = [generate(tiny_glide(), "a dog", steps=3, sampler="ddim", generator=0) for _ in range(2)]
    assert torch.equal(*ddim)


@dataclass
class Recorder:
    """An upsampler that remembers what it was given."""

    inner: object
    asked: list[str] = field(default_factory=list)
    small: Tensor | None = None
    first: Tensor | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def given(self, size: tuple[int, int], small: Tensor, image: Tensor | None, mask: Tensor | None) -> object:
        self.small = small
        given, recorder = self.inner.given(size, small, image, mask), self

        class Given:
            prediction = "epsilon"

            def predict(self, x_t: Tensor, t: Tensor, features: object) -> Tensor:
                recorder.first = x_t if recorder.first is None else recorder.first
                return given.predict(x_t, t, features)

        return Given()

    @property
    def tokenizer(self) -> object:
        tokenizer, asked = self.inner.tokenizer, self.asked

        class Tokenizer:
            def encode(self, texts: list[str], placeholders: dict[str, int]) -> object:
                asked.extend(texts)
                return tokenizer.encode(texts, placeholders)

        return Tokenizer()


def test_an_upsampler_gets_the_drawing_and_plain_words() -> None:
    base, upsampler = tiny_glide(), Recorder(tiny_glide(1, factor=4))
    concept = Concept("<x>", torch.randn(2, 32), {"init": "white dog"})
    alone = generate(base, ["a photo of <x>", "a cat"], steps=2, concepts=[concept], generator=3)
    base.upsampler = upsampler
    steps: list[tuple[int, int]] = []
    large = generate(
        base, ["a photo of <x>", "a cat"], steps=2, concepts=[concept], generator=3,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert large.shape == (2, 3, 64, 64)
    assert large.abs().max() <= 1
    assert upsampler.asked == ["a photo of white dog", "a cat"]
    assert torch.equal(upsampler.small, alone)                       # the base drew what it draws alone
    assert steps == [(i, 29) for i in range(1, 30)]
    stream = torch.Generator().manual_seed(3)
    torch.randn(3, 3, 16, 16, generator=stream)                      # the base: the first noise and that of two steps
    torch.testing.assert_close(
        upsampler.first[0], 0.997 * torch.randn(3, 64, 64, generator=stream), rtol=0, atol=1e-6
    )


def test_an_upsampler_by_itself_enlarges_an_image() -> None:
    upsampler, small = Recorder(tiny_glide(1, factor=4)), picture(16)
    drawn = generate(upsampler, ["a dog", "a cat"], image=small, generator=3)
    assert drawn.shape == (2, 3, 64, 64)
    assert upsampler.asked == ["a dog", "a cat"]                     # at scale 1 the empty prompt has no part
    assert torch.equal(upsampler.small, small.expand(2, -1, -1, -1))
    twice = [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3 + i)) for i in (0, 1)]
    torch.testing.assert_close(upsampler.first, 0.997 * torch.stack(twice), rtol=0, atol=1e-6)
    wide = generate(upsampler, "a dog", image=torch.zeros(3, 8, 16), height=32, width=64, steps=2, generator=0)
    assert wide.shape == (1, 3, 32, 64)


def test_each_image_is_enlarged_by_itself_in_any_batch() -> None:
    upsampler, small = tiny_glide(factor=2), torch.stack([picture(16), picture(16, 1)])
    options = {"steps": 2, "height": 32, "width": 32}
    drawn = generate(upsampler, ["a dog", "a cat"], image=small, batch_size=1, generator=3, **options)
    second = generate(upsampler, "a cat", image=small[1], generator=4, **options)
    torch.testing.assert_close(drawn[1:], second, rtol=0, atol=1e-5)            # float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give it an image of 16x16 pixels"),
        ({"concepts": None}, "concepts is a list of learned words, each an inversion.Concept, not None"),
        ({"image": picture(32)}, "makes 64x64 pixels of 16x16; this image has 32x32"),
        ({"image": picture(16), "mask": torch.ones(16, 16)}, "a mask is for a base model"),
    ],
)
def test_what_an_upsampler_by_itself_cannot_enlarge(options: dict, said: str) -> None:
    with pytest.raises(GuidanceError, match=said):
        generate(tiny_glide(factor=4), "a dog", **options)


def test_the_upsampler_sees_eight_bits_of_the_drawing() -> None:
    model, small = tiny_glide(factor=4), picture(16)[None]
    rounded = (small * 127.5 + 127.5).round() / 127.5 - 1
    given = [model.given((64, 64), image, None, None).images for image in (small, rounded)]
    torch.testing.assert_close(*given, rtol=0, atol=1e-6)        # float32 of numbers up to 1
    assert (given[0] - torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral", "plms", "dpmpp_2m"])
def test_what_is_kept_is_kept_exactly(sampler: str) -> None:
    image, mask = picture(16), torch.zeros(16, 16)
    mask[4:, :10] = 1
    drawn = generate(
        tiny_glide(inpaints=True), ["a dog", "a cat"], steps=4, sampler=sampler, image=image, mask=mask, generator=0
    )
    kept = mask.bool().expand(3, 16, 16)
    assert all(torch.equal(one[kept], image[kept]) for one in drawn)
    assert not torch.allclose(drawn[0][~kept], image[~kept], atol=0.1)


def test_each_image_keeps_its_own_part_in_any_batch() -> None:
    images, masks = torch.stack([picture(16), picture(16, 1)]), torch.zeros(2, 1, 16, 16)
    masks[0, :, 4:, :10] = masks[1, :, :7] = 1
    drawn = generate(
        tiny_glide(inpaints=True), ["a dog", "a cat"], steps=2, image=images, mask=masks, batch_size=1, generator=0
    )
    kept = masks.bool().expand(-1, 3, -1, -1)
    assert torch.equal(drawn[kept], images[kept])
    assert not torch.allclose(drawn[~kept], images[~kept], atol=0.1)


def test_a_cascade_keeps_exactly_too() -> None:
    base = replace(tiny_glide(inpaints=True), upsampler=tiny_glide(1, factor=4, inpaints=True))
    image, mask = picture(64), torch.zeros(1, 1, 64, 64)
    mask[..., 5:, :30] = 1
    drawn = generate(base, "a dog", steps=2, image=image, mask=mask, generator=0)
    kept = mask[0].bool().expand(3, 64, 64)
    assert torch.equal(drawn[0][kept], image[kept])
    assert not torch.allclose(drawn[0][~kept], image[~kept], atol=0.1)


def test_the_mask_shows_what_stays_to_the_network() -> None:
    """The same noise, another image behind the part that is drawn anew: no difference; behind the kept part: one."""
    model, mask = tiny_glide(inpaints=True), torch.zeros(16, 16)
    mask[:, 8:] = 1
    image, other = picture(16), picture(16, 1)
    behind, kept = torch.where(mask.bool(), image, other), torch.where(mask.bool(), other, image)
    first, same, unlike = (
        generate(model, "a dog", steps=2, image=each, mask=mask, generator=0)[..., :8] for each in (image, behind, kept)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, unlike, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": torch.ones(16, 16)}, "give the image, too"),
        ({"mask": torch.ones(8, 8), "image": picture(16)}, r"the mask is \(1, 1, 8, 8\)"),
        ({"mask": torch.full((16, 16), 0.5), "image": picture(16)}, "nothing between"),
        ({"mask": [[1, 0]], "image": picture(16)}, "a mask is a tensor of 0 and 1"),
        ({"mask": torch.ones(16, 16, dtype=torch.complex64), "image": picture(16)}, "not torch.complex64"),
        ({"mask": torch.ones(16, 16), "image": picture(16), "height": 32}, "asked for, 32, is not 16, .* of 16:"),
    ],
)
def test_masks_that_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(GuidanceError, match=said):
        generate(tiny_glide(inpaints=True), "a dog", steps=2, **options)


def test_an_inpainting_cascade_without_a_mask_keeps_nothing() -> None:
    """As with a mask of zeros, in which the image does not count; its upsampler by itself, too."""
    upsampler = tiny_glide(1, factor=4, inpaints=True)
    base = replace(tiny_glide(inpaints=True), upsampler=upsampler)
    drawn = generate(base, "a dog", steps=2, generator=0)
    nothing = generate(base, "a dog", steps=2, image=picture(64), mask=torch.zeros(64, 64), generator=0)
    torch.testing.assert_close(drawn, nothing, rtol=0, atol=1e-5)    # float32: eps is made anew of x_0 where one keeps
    assert generate(upsampler, "a dog", steps=2, image=picture(16)).shape == (1, 3, 64, 64)


def test_a_cascade_refuses_an_image_that_it_cannot_reduce() -> None:
    base = replace(tiny_glide(inpaints=True), upsampler=tiny_glide(1, factor=4, inpaints=True))
    with pytest.raises(GuidanceError, match="a multiple of 4"):
        generate(base, "a dog", steps=2, image=torch.zeros(3, 50, 50), mask=torch.ones(50, 50))


def test_the_sides_asked_for_beside_a_mask_are_the_base_s() -> None:
    base = replace(tiny_glide(inpaints=True), upsampler=tiny_glide(1, factor=4, inpaints=True))
    image, mask = torch.zeros(3, 64, 32), torch.ones(64, 32)
    assert pictures.pictures(base, image, mask, 1, 16, 8).sides == (16, 8)
    with pytest.raises(GuidanceError, match="the height asked for, 64, is not 16, .* an image of 64:"):
        pictures.pictures(base, image, mask, 1, 64, None)
    with pytest.raises(GuidanceError, match="the height asked for, 16, is not 64, .* an image of 64:"):
        pictures.pictures(tiny_glide(inpaints=True), image, mask, 1, 16, None)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 1, 16, 16)])
def test_a_mask_has_one_channel_and_is_one_or_as_many_as_prompts(shape: tuple[int, ...]) -> None:
    with pytest.raises(GuidanceError, match=r"the mask is .*, the image \(1, 3, 16, 16\)"):
        pictures.pictures(tiny_glide(inpaints=True), torch.zeros(3, 16, 16), torch.ones(shape), 1, None, None)


def test_an_upsampler_makes_multiples_of_its_factor() -> None:
    with pytest.raises(GuidanceError, match=r"whose sides are multiples of 2, not \(32, 33\)"):
        pictures.pictures(tiny_glide(factor=2), torch.zeros(3, 16, 16), None, 1, 32, 33)


def test_a_small_pixel_stays_if_all_that_it_covers_does() -> None:
    image, mask = torch.arange(16.0).view(1, 1, 4, 4) / 16, torch.ones(1, 1, 4, 4)
    mask[0, 0, 0, 1] = mask[0, 0, 3, 2] = 0
    small, stays = pictures.reduced((image, mask), 2)
    assert stays.tolist() == [[[[0.0, 1.0], [1.0, 0.0]]]]
    assert small[0, 0, 0, 0] == (0 + 1 + 4 + 5) / 4 / 16


def test_a_mask_of_bools_is_one_of_numbers() -> None:
    base = replace(tiny_glide(inpaints=True), upsampler=tiny_glide(1, factor=4, inpaints=True))
    image, mask = picture(64), torch.zeros(64, 64)
    mask[5:, :30] = 1
    bools, numbers = (pictures.kept(base, image[None], each, 1) for each in (mask.bool(), mask))
    for found, wanted in zip((*bools, *pictures.reduced(bools, 4)), (*numbers, *pictures.reduced(numbers, 4))):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_a_sampler_that_there_is_not(make: Callable) -> None:
    with pytest.raises(ValueError, match="no sampler is called 'heun'"):
        generate(make(), "a dog", sampler="heun")


def test_karras_times_are_those_of_its_sigmas_with_glide_too() -> None:
    assert levels_of(tiny_glide(), "dpmpp_2m_karras", "20") != levels_of(tiny_glide(), "dpmpp_2m", "20")
    assert len(levels_of(tiny_glide(), "dpmpp_2m_karras", 20)) == 21


def test_a_mask_is_for_inpainting_models_only() -> None:
    for model in (tiny_glide(), tiny_model()):
        with pytest.raises(GuidanceError, match="is for inpainting models"):
            generate(model, "a dog", image=picture(16), mask=torch.ones(16, 16), steps=2)


def test_an_upsampler_reads_what_a_word_began_as() -> None:
    """Within the cascade and by itself; a word is no part of a longer one."""
    concept = Concept("sks", torch.randn(2, 32), {"init": "dog", "family": tiny_glide().family})
    prompt, plain = "two masks and one sks", "two masks and one dog"
    negative = {"negative": "a blue sks", "scale": 3.0}
    assert inputs.in_plain_words([prompt], [concept]) == [plain]
    upsampler, small = tiny_glide(factor=2), picture(16)
    options = {"image": small, "steps": 2, "generator": 0, "height": 32, "width": 32}
    drawn = generate(upsampler, prompt, concepts=[concept], **options)
    assert torch.equal(drawn, generate(upsampler, plain, **options))
    drawn = generate(upsampler, prompt, concepts=[concept], **options, **negative)
    assert torch.equal(drawn, generate(upsampler, plain, **options, **negative | {"negative": "a blue dog"}))


def test_the_words_in_a_prompt_are_found_as_a_tokenizer_finds_them() -> None:
    """None within a longer one, at either end; of two that begin alike the longer; none is a pattern."""
    words = {"sks": "dog", "sks-2": "cat", "*": "star", "<a>": "bird"}
    concepts = [Concept(name, torch.zeros(1, 1), {"init": init}) for name, init in words.items()]
    found = inputs.in_plain_words(["a sksy mask, sks and sks-2", "<a>s under a *"], concepts)
    assert found == ["a sksy mask, dog and cat", "birds under a star"]


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(GuidanceError, match=r"has pixels, and this one is \(1, 3, 0, 0\)"):
        generate(tiny_glide(inpaints=True), "a dog", image=torch.zeros(3, 0, 0), mask=torch.ones(0, 0))


def test_keeping_is_consistent_in_eps() -> None:
    x_t, image, mask = picture(4)[None], picture(4, 1)[None], torch.ones(1, 1, 4, 4)
    level = Level(500.0, 0.3)
    found = replace(Prediction.from_eps(x_t, 0 * x_t, level.alpha_bar), var_frac=x_t)
    kept = keeping(lambda x, level: found, image, mask)(x_t, level)
    assert torch.equal(kept.x0, image)
    assert kept.var_frac is x_t
    torch.testing.assert_close(0.3**0.5 * kept.x0 + 0.7**0.5 * kept.eps, x_t, rtol=0, atol=1e-6)   # float32


class TestGradient:
    def test_it_is_that_of_the_log_probability(self) -> None:
        """log N(y; x_t, 1) has the gradient y - x_t, at every time; a time between two is told as the nearer."""
        y, x, seen = picture(4)[None], picture(4, 1)[None], []

        def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
            seen.append(t.tolist())
            return -0.5 * (y - x_t).square().flatten(1).sum(dim=1)

        for time in (17.0, 1.6):
            with torch.no_grad():
                gradient = gradient_of(log_probability, 3.0)(x, Level(time, 0.9))
            torch.testing.assert_close(gradient, 3.0 * (y - x), rtol=0, atol=1e-6)    # float32, up to 6
        assert seen == [[17], [2]]

    def test_it_is_the_same_in_inference_mode(self) -> None:
        """Where no tensor has a gradient unless it is asked for."""
        torch.manual_seed(0)
        clip = NoisyClip(NoisyClipConfig(16, 49408, 20, 2, 2, 16, 4, 2, 2, 1000, 8))
        randomise(clip)
        level = Level(300.0, 0.5)
        wanted = clip_gradient(clip, ["a dog"], 2.0)(picture(16)[None], level)
        with torch.inference_mode():
            found = clip_gradient(clip, ["a dog"], 2.0)(picture(16)[None], level)
        assert wanted.abs().max() > 0
        assert torch.equal(found, wanted)

    @pytest.mark.parametrize("slope", [1e-8, 1e-3, 1e4])
    def test_a_network_in_float16_loses_neither_small_gradients_nor_large_ones(self, slope: float) -> None:
        """1e-8 is nothing in float16, and 1e4 is more than it has if it is raised as much as that needs."""

        def log_probability(x: Tensor, t: Tensor) -> Tensor:
            return (x.half() * 0.5).float().flatten(1).sum(dim=1) * (2 * slope)

        found = gradient_of(log_probability, 1.0)(picture(4)[None], Level(300.0, 0.5))
        torch.testing.assert_close(found, torch.full_like(found, slope), rtol=2e-3, atol=0)     # float16, twice

    def test_an_ancestral_chain_is_drawn_towards_it(self) -> None:
        target = torch.full((1, 3, 16, 16), 0.8)

        def distance(scale: float) -> float:
            gradient = gradient_of(lambda x, t: -(x - target).square().flatten(1).sum(dim=1), scale)
            drawn = generate(tiny_glide(), "a dog", scale=1.0, steps=10, guidance=gradient, generator=0)
            return (drawn - target).square().mean().item()

        assert distance(1.0) < 0.7 * distance(0.0)

    def test_a_scale_of_nothing_changes_nothing(self) -> None:
        still = gradient_of(lambda x, t: x.flatten(1).sum(dim=1), 0.0)
        options = {"steps": 3, "generator": 0}
        drawn = generate(tiny_glide(), "a dog", guidance=still, **options)
        plain = generate(tiny_glide(), "a dog", **options)
        torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-6)      # float32: 0 is added

    def test_clip_s_gradient_raises_the_similarity(self) -> None:
        torch.manual_seed(0)
        clip = NoisyClip(NoisyClipConfig(16, 49408, 20, 2, 2, 16, 4, 2, 2, 1000, 8))
        randomise(clip)
        texts, x, level = ["a dog", "a cat"], torch.stack([picture(16), picture(16, 1)]), Level(300.0, 0.5)
        gradient = clip_gradient(clip, texts, 2.0)(x, level)
        text, t = clip.encode_text(texts), torch.tensor([300, 300])
        before, after = (clip.similarity(text, each, t) for each in (x, x + 1e-3 * gradient.sign()))
        assert (after > before).all()
        # to first order the rise is the step's length times the gradient, which carries the scale of 2
        rise = (1e-3 * gradient.abs() / 2).flatten(1).sum(dim=1)
        torch.testing.assert_close(after - before, rise, rtol=0.1, atol=0)

    def test_clip_computes_in_its_own_dtype_and_says_what_it_wants(self) -> None:
        torch.manual_seed(0)
        clip = NoisyClip(NoisyClipConfig(16, 49408, 20, 2, 2, 16, 4, 2, 2, 1000, 8)).bfloat16()
        x, level = torch.stack([picture(16), picture(16, 1)]), Level(300.0, 0.5)
        assert clip_gradient(clip, ["a dog", "a cat"], 1.0)(x, level).dtype == x.dtype
        for texts, images, said in (
            (["a dog"], x, "1 texts want as many images of 3 channels and 16x16 pixels"),
            (["a dog"], x[:1, :, :8, :8], r"\(1, 3, 8, 8\)"),
            ("a dog", x, r"one an image, \['a dog'\]"),
            ([], x, "no text"),
        ):
            with pytest.raises(GuidanceError, match=said):
                clip_gradient(clip, texts, 1.0)(images, level)
        with pytest.raises(GuidanceError, match="a GlideModel is no noise-aware CLIP"):
            clip_gradient(tiny_glide(), ["a dog"], 1.0)

    def test_it_is_of_all_images_at_once(self) -> None:
        gradient = gradient_of(lambda x, t: x.flatten(1).sum(dim=1), 1.0)
        with pytest.raises(GuidanceError, match="raise batch_size"):
            generate(tiny_glide(), ["a dog", "a cat"], guidance=gradient, batch_size=1, steps=2)


def test_levels_of_stable_diffusion_are_what_they_were() -> None:
    assert levels_of(tiny_model(), "ddpm", 4)[0] == Schedule("scaled_linear").level(751)


def test_what_is_kept_is_known_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only put in at the end: the rest is drawn to go with it."""
    image, mask, seen, predict = picture(16), torch.zeros(16, 16), [], GivenImages.predict
    mask[4:, :10] = 1

    def record(given: GivenImages, x_t: Tensor, t: Tensor, features: object) -> Tensor:
        seen.append(x_t[0])
        return predict(given, x_t, t, features)

    monkeypatch.setattr(GivenImages, "predict", record)
    model, kept = tiny_glide(inpaints=True), mask.bool().expand(3, 16, 16)
    generate(model, "a dog", steps=10, sampler="ddim", image=image, mask=mask, generator=0)
    start, end = (levels_of(model, "ddim", "10")[i].alpha_bar for i in (0, -2))
    eps = (seen[0] - start**0.5 * image) / (1 - start) ** 0.5               # DDIM keeps the eps of an x_0 that is known
    wanted = end**0.5 * image + (1 - end) ** 0.5 * eps
    torch.testing.assert_close(seen[-1][kept], wanted[kept], rtol=0, atol=1e-4)      # float32, ten steps
    assert not torch.allclose(seen[-1][~kept], wanted[~kept], atol=0.1)
