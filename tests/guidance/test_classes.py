"""Models of classes through `generate`: what a scale means, who can guide itself, and a classifier beside it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion import Schedule, ddim, last, respaced
from guidance import GuidanceError, bind, classifier, classifier_free, generate
from guidance.chain import clamped
from inversion import Concept
from models import ClassModel, ModelError
from models.class_names import ClassNames
from models.classifier import Classifier, ClassifierConfig
from models.unet import UNetConfig
from models.unet_model import Sampling
from tests.tiny import randomise, tiny_classes

STEPS = {"sampler": "ddim", "steps": 4, "generator": 0}


def by_hand(model: ClassModel, prompts: list[str], scale: float) -> Tensor:
    """null + scale (conditional - null) at every step, from two denoisers of B images."""
    features = [model.encode_text(model.tokenizer.encode(texts)) for texts in (prompts, [""] * len(prompts))]
    denoise = clamped(classifier_free(*(bind(model, feature) for feature in features), scale))
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))]
    levels = Schedule(**model.schedule).levels(respaced("4"))
    with torch.no_grad():
        return last(ddim(denoise, torch.stack(noise), levels)).clamp(-1, 1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_a_model_guides_itself_between_no_class_and_a_class(scale: float) -> None:
    """float32, in batches of two or four: the sums of four steps differ in order."""
    model = tiny_classes()
    drawn = generate(model, ["dog", "owl"], scale=scale, **STEPS)
    torch.testing.assert_close(drawn, by_hand(model, ["dog", "owl"], scale), rtol=0, atol=2e-4)


def test_scale_0_is_without_a_class_and_scale_1_with_it() -> None:
    model = tiny_classes()
    without, dogs = (generate(model, prompt, scale=1, **STEPS) for prompt in ("", "dog"))
    assert torch.equal(generate(model, "dog", scale=0, **STEPS), without)
    assert (dogs - without).abs().max() > 0.1
    assert torch.equal(generate(model, "0", scale=1, **STEPS), dogs)


def test_a_class_to_keep_away_from() -> None:
    model = replace(tiny_classes(), null=False)                            # needs no ∅: both sides are classes
    drawn = generate(model, "dog", negative="cat", scale=2, **STEPS)
    assert not torch.allclose(drawn, generate(model, "dog", scale=1, **STEPS), atol=1e-2)


def test_who_cannot_guide_itself_is_told_what_can() -> None:
    published = replace(tiny_classes(), null=False)
    with pytest.raises(ModelError, match=r"never trained without a class.*guidance\.classifier"):
        generate(published, "dog", scale=3, **STEPS)
    assert generate(published, "dog", **STEPS).isfinite().all()            # its own scale is 1
    unconditional = tiny_classes(classes=())
    with pytest.raises(GuidanceError, match=r"draws no classes, so a guidance scale of 3.*guidance\.classifier"):
        generate(unconditional, "", scale=3, **STEPS)
    assert torch.equal(generate(unconditional, "", scale=0, **STEPS), generate(unconditional, "", **STEPS))


def test_classes_and_words_that_there_are_not() -> None:
    with pytest.raises(ModelError, match="no class 'wolf'; there are 3: dog, cat, owl"):
        generate(tiny_classes(), ["dog", "wolf"], **STEPS)
    with pytest.raises(ModelError, match="no class '3'; there are 3"):
        generate(tiny_classes(), "3", **STEPS)
    with pytest.raises(ModelError, match="no class 2.5; there are 3"):
        tiny_classes().classes.index(2.5)
    with pytest.raises(GuidanceError, match=r"reads \(n, 0\)"):
        generate(tiny_classes(), "<x>", concepts=[Concept("<x>", torch.zeros(1, 32))], **STEPS)


def judge_of(model: ClassModel) -> Classifier:
    torch.manual_seed(0)
    config = UNetConfig(3, 3, 32, (1, 2), 1, (2,), None, 16, attention="self_legacy", scale_shift=True)
    network = Classifier(ClassifierConfig(config, 16), model.classes)
    randomise(network)
    return network


@pytest.mark.filterwarnings("ignore:.* adds the gradient to the score")
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "plms", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_a_classifier_guides_beside_the_model_s_own_guidance(sampler: str, scale: float) -> None:
    """The likelier its class, at every scale of the other."""
    model = tiny_classes()
    network, t = judge_of(model), torch.zeros(2)
    how = {"scale": scale, "steps": 8, "sampler": sampler, "generator": 0}
    plain = generate(model, ["dog", "owl"], **how)
    guided = generate(model, ["dog", "owl"], **how, guidance=classifier(network, ["cat", "cat"], 30.0))
    with torch.no_grad():
        before, after = (network(x, t).log_softmax(dim=1)[:, 1].mean() for x in (plain, guided))
    assert after > before


def test_a_classifier_s_classes_go_by_name_or_number() -> None:
    network, x = judge_of(tiny_classes()), torch.rand(2, 3, 16, 16)
    level = Schedule("squaredcos_cap_v2").level(300)
    assert torch.equal(classifier(network, ["owl", "dog"], 1.0)(x, level), classifier(network, [2, 0], 1.0)(x, level))
    with pytest.raises(GuidanceError, match="class wolf is none: this classifier knows dog, cat, owl"):
        classifier(network, ["wolf"], 1.0)


def test_an_upsampler_is_told_the_class_and_the_small_image() -> None:
    upsampler, small = tiny_classes(1, factor=2), torch.rand(3, 16, 16) * 2 - 1
    drawn = generate(upsampler, ["dog", "dog"], image=small, steps=2, generator=[0, 0])
    assert drawn.shape == (2, 3, 32, 32)
    assert torch.equal(drawn[0], drawn[1])
    of_cat, of_other = (
        generate(upsampler, ["dog", "cat"][i], image=[small, -small][1 - i], steps=2, generator=0) for i in (1, 0)
    )
    for other in (of_cat, of_other):
        assert not torch.allclose(other, drawn[:1], atol=1e-2)
    with pytest.raises(GuidanceError, match="give it an image of 16x16 pixels"):
        generate(upsampler, "dog")


def test_a_cascade_draws_what_its_parts_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassModel, "sampling", Sampling("ddpm", "2", 1.0))     # an upsampler's own 250 take a while
    base, upsampler = tiny_classes(), tiny_classes(1, factor=2)
    both = replace(base, upsampler=upsampler)
    large = generate(both, ["cat"], scale=2, steps=2, sampler="ddim", generator=0)
    assert large.shape == (1, 3, 32, 32)
    other = generate(both, ["owl"], scale=2, steps=2, sampler="ddim", generator=0)
    assert not torch.allclose(large, other, atol=1e-2)
    unknown = replace(upsampler, classes=ClassNames(("a", "b", "c")))
    with pytest.raises(ModelError, match="no class 'cat'"):
        generate(replace(base, upsampler=unknown), ["cat"], steps=2, sampler="ddim", generator=0)
