import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import ClipTokenizer, GlideModel, LatentModel, ModelError, TextFeatures, presets, save
from models.presets import PRESETS, TINY, untrained
from models.setting import Setting, place
from models.text import ClipText
from models.unet import UNet
from models.unet_model import PREDICTIONS
from models.vae import VAE
from models.weights import on_meta
from tests.tiny import tiny_glide, tiny_model


@pytest.fixture
def model() -> LatentModel:
    torch.manual_seed(0)
    model = untrained(TINY)
    with torch.no_grad():  # an untrained UNet is silent: the layers that end its branches start at zero
        for parameter in model.unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_comes_out_as_float32_or_better(model: LatentModel, dtype: torch.dtype) -> None:
    out = torch.promote_types(dtype, torch.float32)
    for network in (model.unet, model.vae, model.text):
        network.to(dtype)
    assert model.dtype == dtype
    features = model.encode_text(model.tokenizer.encode(["a dog", ""]))
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    moments = model.moments(images)
    x0 = model.draw_x0(moments, torch.zeros(2, 4, 16, 32))
    raw = model.predict(x0, torch.tensor([1, 2]), features)
    decoded = model.decode(x0)
    assert [t.dtype for t in (moments, x0, raw, decoded)] == [out] * 4
    assert (moments.shape, x0.shape, raw.shape) == ((2, 8, 16, 32), (2, 4, 16, 32), (2, 4, 16, 32))
    assert decoded.shape == images.shape
    assert model.embedding(5).dtype == torch.float32


def test_of_no_images_there_are_no_predictions(model: LatentModel) -> None:
    """A batch that was filtered down to nothing."""
    features, t = TextFeatures(torch.zeros(0, 77, 32)), torch.zeros(0, dtype=torch.long)
    assert model.predict(torch.zeros(0, 4, 16, 16), t, features).shape == (0, 4, 16, 16)
    assert model.decode(torch.zeros(0, 4, 16, 16)).shape == (0, 3, 32, 32)


def test_without_noise_a_latent_is_the_scaled_mean(model: LatentModel) -> None:
    moments = torch.randn(2, 8, 4, 4)
    assert torch.equal(model.draw_x0(moments, torch.zeros(2, 4, 4, 4)), 0.18215 * moments[:, :4])


def test_a_latent_is_drawn_in_float32(model: LatentModel) -> None:
    """From moments that were cached in half the room, too."""
    moments, noise = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 4, 4)
    assert model.draw_x0(moments.bfloat16(), noise.bfloat16()).dtype == torch.float32


def test_the_log_variance_of_a_latent_is_clamped(model: LatentModel) -> None:
    """To [-30, 20], as CompVis/stable-diffusion does: an encoder's outlier is neither infinite nor nothing."""
    logvar = torch.tensor([-100.0, -30.0, 20.0, 100.0])
    moments = torch.cat([torch.zeros(4), logvar]).view(1, 8, 1, 1)
    deviations = model.draw_x0(moments, torch.ones(1, 4, 1, 1)).flatten() / 0.18215
    wanted = torch.tensor([-15.0, -15.0, 10.0, 10.0]).exp()
    torch.testing.assert_close(deviations, wanted, rtol=1e-6, atol=0)                          # three float32 roundings


def test_decoded_images_are_clamped(model: LatentModel) -> None:
    model.vae.decoder.conv_out.bias[:] = torch.tensor([5.0, -5.0, 0.0])
    images = model.decode(torch.randn(1, 4, 8, 8))
    assert images[:, 0].eq(1).all()
    assert images[:, 1].eq(-1).all()
    assert images[:, 2].abs().mean() < 1


def test_only_learned_vectors_receive_a_gradient(model: LatentModel) -> None:
    vectors = torch.randn(2, 32, requires_grad=True)
    tokens = model.tokenizer.encode(["a <x>"], {"<x>": 2})
    raw = model.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), model.encode_text(tokens, vectors))
    raw.square().sum().backward()
    assert vectors.grad.abs().sum(dim=1).min() > 0
    assert all(p.grad is None for net in (model.unet, model.vae, model.text) for p in net.parameters())


def test_images_and_latents_keep_nothing_for_a_gradient(model: LatentModel) -> None:
    assert not model.decode(torch.randn(1, 4, 8, 8, requires_grad=True)).requires_grad
    assert not model.moments(torch.rand(1, 3, 16, 16, requires_grad=True)).requires_grad


def test_text_and_images_are_brought_to_the_device(model: LatentModel) -> None:
    """The meta device stands for a GPU: torch refuses to look up in, or convolve, what lies on two."""
    assert model.to("meta").device.type == "meta"
    features = model.encode_text(model.tokenizer.encode(["a <x>"], {"<x>": 2}), torch.zeros(2, 32))
    found = features.context, model.moments(torch.zeros(1, 3, 16, 16)), model.decode(torch.zeros(1, 4, 8, 8))
    assert {x.device.type for x in found} == {"meta"}


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_a_token_s_vector_is_a_copy(make: Callable[[], LatentModel | GlideModel]) -> None:
    """Of a text transformer that is trained, too: what is done to it reaches no table."""
    model = make()
    model.text.requires_grad_()
    before = model.embedding(5).clone()
    model.embedding(5).zero_()
    assert torch.equal(model.embedding(5), before)
    assert not model.embedding(5).requires_grad


def test_times_may_lie_between(model: LatentModel) -> None:
    features = TextFeatures(torch.randn(1, 32, 32))
    first, between, last = (
        model.predict(torch.ones(1, 4, 8, 8), torch.tensor([t]), features) for t in (10, 10.5, 11)
    )
    assert not torch.equal(first, between)
    assert not torch.equal(between, last)


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
@pytest.mark.parametrize("shape", [None, (2, 32), (3, 31), (32,)])
def test_the_vectors_that_prompts_read_are_there(
    make: Callable[[], LatentModel | GlideModel], shape: tuple[int, ...] | None
) -> None:
    model = make()
    extra, tokens = None if shape is None else torch.zeros(shape), model.tokenizer.encode(["a <x>", ""], {"<x>": 3})
    found = "none" if shape is None else re.escape(str(shape))
    with pytest.raises(ModelError, match=f"read 3 learned vectors of width 32, and given are {found}: give .3, 32."):
        model.encode_text(tokens, extra)


@pytest.mark.parametrize("t", [5, torch.tensor(5), torch.tensor([5, 900]), torch.full((4, 1), 5)])
def test_there_is_a_time_an_image(model: LatentModel, t: object) -> None:
    """Two times would be told to four images in turn, and the answer to each would look like one."""
    features = model.encode_text(model.tokenizer.encode(["a dog"] * 4))
    with pytest.raises(ModelError, match=r"times are a tensor \(4,\), one an image, not"):
        model.predict(torch.zeros(4, 4, 16, 16), t, features)



class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 4), (4, 12)])
    def test_latents(self, model: LatentModel, height: int, width: int) -> None:
        shape = model.x0_shape(height, width)
        assert shape == (4, height // 2, width // 2)
        model.unet(torch.randn(1, *shape), torch.zeros(1), torch.randn(1, 32, 32))  # the networks do take it
        assert model.moments(torch.randn(1, 3, height, width)).shape[2:] == shape[1:]

    @pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 31), (0, 32), (-4, 4), (1, 1)])
    def test_what_cannot_be_halved_names_the_multiple(
        self, model: LatentModel, height: int, width: int
    ) -> None:
        with pytest.raises(ModelError, match=r"multiples of 4, \d+x\d+ for example"):
            model.x0_shape(height, width)

    def test_stable_diffusion_takes_multiples_of_64(self) -> None:
        sd = on_meta(lambda: UNet(presets.SD1.unet)), on_meta(lambda: VAE(presets.SD1.vae))
        text = on_meta(lambda: ClipText(presets.SD1.text))
        model = LatentModel("sd1", *sd, text, ClipTokenizer.clip(), {}, "epsilon", 512, "meta")
        assert model.x0_shape(512, 768) == (4, 64, 96)
        with pytest.raises(ModelError, match="700x520 pixels .* multiples of 64, 704x512 for example"):
            model.x0_shape(520, 700)

    def test_a_row_that_the_vae_would_leave_out_is_said(self, model: LatentModel) -> None:
        with pytest.raises(ModelError, match="64x65 pixels .* multiples of 2, "):
            model.moments(torch.zeros(1, 3, 65, 64))


class TestReleasedEncoder:
    def test_what_needs_it_says_so(self, model: LatentModel, tmp_path: Path) -> None:
        model.release_encoder()
        for use in (
            lambda: model.moments(torch.zeros(1, 3, 8, 8)),
            lambda: model.decode(torch.zeros(1, 4, 4, 4)),
            lambda: save(model, tmp_path / "model"),
        ):
            with pytest.raises(ModelError, match="released"):
                use()

    def test_the_rest_goes_on(self, model: LatentModel) -> None:
        moments, noise = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 4, 4)
        before = model.draw_x0(moments, noise)
        model.release_encoder()
        assert torch.equal(model.draw_x0(moments, noise), before)
        assert model.x0_shape(32, 32) == (4, 16, 16)
        assert model.to("cpu") is model

    def test_its_memory_is_gone(self, model: LatentModel) -> None:
        model.release_encoder()
        assert all(p.is_meta for p in model.vae.parameters())


class TestParts:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"prediction": "x0"}, "predicts 'x0'"),
            ({"tokenizer": 600}, "vocabulary"),
            ({"unet": {"context_dim": 64}}, "context"),
            ({"unet": {"in_channels": 9}}, "inpainting"),
            ({"unet": {"out_channels": 8}}, "output channels"),
            ({"vae": {"in_channels": 6}}, "the VAE's channels and an image's differ, 6 and 3"),      # depth, as LDM3D's
        ],
    )
    def test_what_does_not_fit_is_refused(self, model: LatentModel, change: dict, said: str) -> None:
        if "unet" in change:
            change = {"unet": UNet(replace(TINY.unet, **change["unet"]))}
        if "vae" in change:
            change = {"vae": VAE(replace(TINY.vae, **change["vae"]))}
        if "tokenizer" in change:
            change = {"tokenizer": ClipTokenizer.train(["a"], 600, 32)}
        with pytest.raises(ModelError, match=said):
            LatentModel(**(vars(model) | change))


    def test_a_tokenizer_of_another_length_is_refused(self, model: LatentModel) -> None:
        with pytest.raises(ModelError, match="tokenizer's length and the text's differ, 8 and 32"):
            replace(model, tokenizer=ClipTokenizer(model.tokenizer.vocabulary, 8))


class TestPresets:
    def test_the_published_models(self) -> None:
        assert {
            name: (p.family, p.prediction, p.resolution, p.text.layers) for name, p in PRESETS.items()
        } == {
            "sd1.4": ("sd1", "epsilon", 512, 12),
            "sd1.5": ("sd1", "epsilon", 512, 12),
            "sd2.0": ("sd2", "v_prediction", 768, 23),
            "sd2.0-base": ("sd2", "epsilon", 512, 23),
            "sd2.1": ("sd2", "v_prediction", 768, 23),
            "sd2.1-base": ("sd2", "epsilon", 512, 23),
            "tiny": ("tiny", "epsilon", 32, 2),
        }
        assert all(p.prediction in PREDICTIONS for p in PRESETS.values())

    def test_stable_diffusion_is_drawn_as_its_script_does(self, model: LatentModel) -> None:
        """scripts/txt2img.py of CompVis/stable-diffusion @ 21f890f: DDIM unless --plms, 50 steps, scale 7.5."""
        assert [tuple(replace(model, family=name).sampling) for name in ("sd1", "sd2")] == [("ddim", 50, 7.5, 1.0)] * 2

    def test_an_untrained_model_is_frozen(self, model: LatentModel) -> None:
        assert not any(
            p.requires_grad for net in (model.unet, model.vae, model.text) for p in net.parameters()
        )
        assert not any(net.training for net in (model.unet, model.vae, model.text))


def test_large_images_are_encoded_and_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of 512x512 took 6.5 GiB of a GPU, after all of the drawing; small ones go together, which is quicker."""
    model, seen = tiny_model(), []
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = model.moments(images), model.decode(torch.ones(3, 4, 8, 8))
    for name in ("encode", "decode"):
        method = getattr(VAE, name)
        monkeypatch.setattr(VAE, name, lambda vae, x, method=method: seen.append(len(x)) or method(vae, x))
    for pixels, sizes in ((3 * 256, [3]), (2 * 256, [2, 1]), (1, [1, 1, 1])):
        monkeypatch.setattr("models.latent.PIXELS", pixels)
        for found, wanted in zip((model.moments(images), model.decode(torch.ones(3, 4, 8, 8))), together):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)        # float32: other kernels for one image
        assert seen == sizes * 2
        seen.clear()
    assert model.decode(torch.ones(0, 4, 8, 8)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("offload", ["none", "idle"])
def test_an_autoencoder_that_leaves_the_range_of_float16_decodes_in_float32(offload: str) -> None:
    """It drew black images, after all of the drawing."""
    model = tiny_model()
    model.vae.half().post_quant_conv.weight.mul_(2**14)             # times 4 channels of 8 it passes 65504
    x0 = torch.full((2, 4, 8, 8), 8.0)
    wide = copy.deepcopy(model.vae).float()
    wanted = wide.decode(x0).clamp(-1, 1)
    if offload == "idle":
        place(model, Setting(torch.float16, offload="idle"), torch.device("cpu"))
    assert not model.vae.decode(x0.half()).isfinite().all()
    torch.testing.assert_close(model.decode(x0), wanted, rtol=0, atol=1e-5)          # float32: another batch
    assert model.vae.quant_conv.weight.dtype == torch.float16


def test_a_map_that_cannot_be_halved_is_refused_by_the_unet_itself() -> None:
    model = tiny_model()
    features = model.encode_text(model.tokenizer.encode(["a dog"]))
    with pytest.raises(ModelError, match=r"a map of \(8, 9\) cannot be halved by this UNet: both .* multiples of 2"):
        model.predict(torch.zeros(1, 4, 8, 9), torch.tensor([5]), features)


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_bytes_are_no_images(make: Callable[[], Any]) -> None:
    """0 … 255 were taken as they are."""
    with pytest.raises(ModelError, match="images are floats in .*, not torch.uint8: of bytes, images / 127.5 - 1"):
        make().moments(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8))
