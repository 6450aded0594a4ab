"""GLIDE's networks against the key lists of the public files, its tokenizer's edges, its model, its files."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models import ClipTokenizer, GlideModel, ModelError, noisy_clip
from models.glide_file import read_glide
from models.glide_text import GlideText
from models.glide_tokenizer import GlideTokenizer
from models.noisy_clip import NoisyClip, NoisyClipConfig
from models.pixels import beside
from models.presets import GLIDE
from models.single_file import read_single_file
from models.unet import UNet
from models.weights import on_meta
from tests.tiny import tiny_glide, tiny_glide_tokenizer, tiny_model

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"
CLIP = {"glide_clip_text_enc": "text_encoder", "glide_clip_image_enc": "image_encoder"}


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in content["tensors"].items()}


def shapes(*networks: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for network in networks for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", GLIDE)
def test_the_published_networks_have_exactly_these_tensors(name: str) -> None:
    unet, text = on_meta(lambda: UNet(GLIDE[name].unet)), on_meta(lambda: GlideText(GLIDE[name].text))
    assert shapes(unet, text) == manifest(f"glide_{name}")


# What no tensor tells, in model_creation.py @ 69b5307: num_head_channels, xf_heads, noise_schedule. The betas are those
# of gaussian_diffusion.py.
COSINE = {"name": "squaredcos_cap_v2", "steps": 1000}
LINEAR = {"name": "linear", "steps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
DEFAULTS = {"base": (64, 8, COSINE), "upsample": (64, 8, LINEAR)}


@pytest.mark.parametrize("name", GLIDE)
def test_what_no_tensor_tells_is_as_published(name: str) -> None:
    preset = GLIDE[name]
    found = preset.unet.head_channels, preset.text.heads, preset.schedule
    assert found == DEFAULTS[name.removesuffix("_inpaint")]
    assert preset.prediction == "epsilon"


@pytest.mark.parametrize("name", CLIP)
def test_the_published_clip_has_exactly_these_tensors(name: str) -> None:
    clip = on_meta(lambda: NoisyClip(NoisyClipConfig()))
    assert shapes(getattr(clip, CLIP[name])) == manifest(name)


class TestTokenizer:
    def test_a_placeholder_stands_where_a_word_would(self) -> None:
        """The space before it goes with it, the one after it with the next word."""
        tokenizer = GlideTokenizer.gpt2(12)
        plain = tokenizer.encode(["a photo of dog, in snow"]).ids[0].tolist()
        learned = tokenizer.encode(["a photo of <x>, in snow"], {"<x>": 2}).ids[0].tolist()
        assert learned[:8] == [*plain[:3], 50257, 50258, *plain[4:7]]

    def test_a_placeholder_at_either_end(self) -> None:
        tokens = GlideTokenizer.gpt2(6).encode(["<x> dog", "dog <x>", "<x> <x>", "<x>"], {"<x>": 1})
        dog, at_first = (GlideTokenizer.gpt2(6).encode([text]).ids[0, 0].item() for text in (" dog", "dog"))
        rows = [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask)]
        assert rows == [[50257, dog], [at_first, 50257], [50257, 50257], [50257]]

    def test_the_padding_never_moves(self) -> None:
        tokens = GlideTokenizer.gpt2(8).encode(["", "a <x>"], {"<x>": 3})
        assert tokens.ids[0].tolist() == [50256] * 8
        assert not tokens.mask[0].any()
        assert tokens.ids[1, 4:].tolist() == [50256] * 4
        assert tokens.mask[1].tolist() == [True] * 4 + [False] * 4

    def test_what_does_not_fit_is_cut_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="' dog'"):
            tokens = GlideTokenizer.gpt2(3).encode(["a photo of dog"])
        assert tokens.mask.all()
        assert tokens.cut == [" dog"]
        with pytest.warns(UserWarning, match="cut off: ' dog <o> dog'"):
            tiny_glide_tokenizer().encode(["dog " * 24 + "<o> dog"], {"<o>": 2})

    def test_words_are_known_inside_a_sentence_and_at_its_beginning(self) -> None:
        tokenizer = GlideTokenizer.gpt2()
        assert tokenizer.is_word("dog")
        assert tokenizer.is_word(" dog")
        assert not tokenizer.is_word("<frida>")
        assert tokenizer.tokens_of("dog") == tokenizer.encode(["a dog"]).ids[0, 1:2].tolist()
        assert tokenizer.tokens_of("  ") == []

    def test_the_clip_s_entities_become_what_they_stand_for_once_and_again(self) -> None:
        clip = noisy_clip.tokenizer()
        assert clip.tokens_of("&amp;lt;") == clip.tokens_of("&lt;") == clip.tokens_of("<")
        assert clip.tokens_of("&amp;amp;lt;") == ClipTokenizer.clip().tokens_of("&lt;")

    def test_one_learned_from_captions_knows_their_words(self) -> None:
        tokenizer = tiny_glide_tokenizer()
        assert len(tokenizer.tokens_of("white")) == 1
        text = "an Übergroßer dog 🐶"
        ids = tokenizer.encode([text])
        assert tokenizer.decode(ids.ids[ids.mask].tolist()) == text.lower()
        assert GlideTokenizer.train(["DOG"], 300).is_word("dog")
        with pytest.raises(ModelError, match="no room"):
            GlideTokenizer.train(["a"], 200)


class TestModel:
    def test_padding_is_what_is_learned_of_it_whatever_the_ids(self) -> None:
        model = tiny_glide()
        tokens = model.tokenizer.encode(["a dog"])
        features = model.encode_text(tokens)
        others = replace(tokens, ids=torch.where(tokens.mask, tokens.ids, 7))
        assert torch.equal(model.encode_text(others).context, features.context)
        seen = replace(tokens, mask=torch.ones_like(tokens.mask))
        assert not torch.allclose(model.encode_text(seen).pooled, features.pooled, atol=1e-3)

    def test_a_learned_word_reaches_the_answer_by_context_and_by_the_pooled_text(self) -> None:
        model, x = tiny_glide(), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        features = model.encode_text(model.tokenizer.encode(["a <x>"], {"<x>": 2}), vectors)
        for other in (
            features._replace(context=features.context.detach()), features._replace(pooled=features.pooled.detach())
        ):
            out = model.predict(x, torch.tensor([500]), other)
            (gradient,) = torch.autograd.grad(out.square().sum(), vectors, retain_graph=True)
            assert (gradient.abs().amax(dim=1) > 1e-4).all()

    def test_an_inpainting_network_that_is_given_nothing_keeps_nothing(self) -> None:
        model, x, t = tiny_glide(inpaints=True), torch.ones(2, 3, 16, 16), torch.tensor([500, 20])
        features = model.encode_text(model.tokenizer.encode(["a dog", ""]))
        given = model.given((16, 16), None, torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16))
        assert torch.equal(given.predict(x, t, features), model.predict(x, t, features))

    def test_what_stands_beside_is_repeated_for_a_doubled_batch(self) -> None:
        model, t = tiny_glide(factor=4), torch.full((4,), 300)
        features = model.encode_text(model.tokenizer.encode(["a dog", "a cat"] * 2))
        small, x = torch.rand(2, 3, 16, 16) * 2 - 1, torch.ones(4, 3, 64, 64)
        out = model.given((64, 64), small, None, None).predict(x, t, features)
        torch.testing.assert_close(out[:2], out[2:], rtol=0, atol=1e-6)      # rows of one product may differ by an ulp
        assert not torch.allclose(out[0], out[1], atol=1e-3)
        with pytest.raises(ModelError, match="enlarges"):
            model.predict(x, t, features)

    def test_images_are_float32_of_any_dtype_and_within_their_range(self) -> None:
        model, x = tiny_glide(), torch.tensor([-1.5, 0.5, 2.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
        assert torch.equal(model.moments(x), torch.tensor([-1.5, 0.5, 2.0]).view(1, 3, 1, 1))
        assert torch.equal(model.decode(x), torch.tensor([-1.0, 0.5, 1.0]).view(1, 3, 1, 1))
        assert model.moments(x).dtype == model.decode(x).dtype == torch.float32

    def test_the_input_channels_in_their_order(self) -> None:
        image, mask = torch.full((1, 3, 4, 4), 0.5), torch.ones(1, 1, 4, 4)
        mask[..., 0] = 0
        known, seen, small = beside((4, 4), torch.full((1, 3, 2, 2), -0.25), image, mask)
        assert known[0, 0, 0].tolist() == [0, 0.5, 0.5, 0.5]
        assert torch.equal(seen, mask)
        assert torch.equal(small, torch.full((1, 3, 4, 4), -0.25))

    def test_a_small_image_of_another_size_is_refused(self) -> None:
        with pytest.raises(ModelError, match="enlarges 4 times: a small image of 8x16 pixels is not that of 64x32"):
            tiny_glide(factor=4).given((32, 64), torch.zeros(1, 3, 16, 8), None, None)

    def test_parts_that_do_not_fit_each_other(self) -> None:
        model = tiny_glide()
        with pytest.raises(ModelError, match="upsampler's resolution .* 64 and 128"):
            replace(model, upsampler=replace(tiny_glide(factor=4), factor=8))
        with pytest.raises(ModelError, match="input channels"):
            replace(model, inpaints=True)
        with pytest.raises(ModelError, match="output channels and twice an image's differ, 3 and 6"):
            replace(model, unet=UNet(replace(model.unet.config, out_channels=3)))
        with pytest.raises(ModelError, match="context and the text's width differ, 16 and 32"):
            replace(model, unet=UNet(replace(model.unet.config, context_dim=16)))
        with pytest.raises(ModelError, match="vocabulary"):
            replace(model, tokenizer=GlideTokenizer.gpt2(24))
        with pytest.raises(ModelError, match="tokenizer's length and the text's differ, 12 and 24"):
            replace(model, tokenizer=GlideTokenizer(model.tokenizer.merges, 12))
        with pytest.raises(ModelError, match="time embedding and the pooled text differ, 128 and 64"):
            replace(model, text=GlideText(replace(model.text.config, pooled_dim=64)))

    def test_a_text_of_a_width_that_its_heads_do_not_divide(self) -> None:
        with pytest.raises(ModelError, match="heads"):
            replace(tiny_glide().text.config, heads=5)

    def test_an_upsampler_moves_along(self) -> None:
        model = replace(tiny_glide(), upsampler=tiny_glide(factor=4))
        assert model.to("meta") is model
        networks = (model.unet, model.text, model.upsampler.unet, model.upsampler.text)
        assert all(parameter.is_meta for network in networks for parameter in network.parameters())

    @pytest.mark.parametrize(
        ("height", "width", "near"),
        [(15, 16, "16x16"), (16, 15, "16x16"), (0, 16, "16x2"), (16, 0, "2x16"), (-2, 16, "16x2"), (16, -2, "2x16")],
    )
    def test_a_size_that_cannot_be_halved(self, height: int, width: int, near: str) -> None:
        with pytest.raises(ModelError, match=rf"{width}x{height} pixels .* multiples of 2, {near} for example"):
            tiny_glide().x0_shape(height, width)
        assert tiny_glide().x0_shape(16, 32) == (3, 16, 32)


class TestClipFiles:
    def test_both_encoders_are_read_strictly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small = NoisyClipConfig(16, 49408, 20, 2, 2, 16, 4, 2, 2, 1000, 8)
        monkeypatch.setattr("models.glide_hub.NoisyClipConfig", lambda: small)
        clip = NoisyClip(small)
        torch.save(clip.text_encoder.state_dict(), tmp_path / "clip_text_enc.pt")
        with pytest.raises(ModelError, match=r"there is no .*clip_image_enc\.pt"):
            models.load_noisy_clip(tmp_path)
        with pytest.raises(ModelError, match="there is no device 'gpu': use cpu"):
            models.load_noisy_clip(tmp_path, device="gpu")
        torch.save(clip.image_encoder.state_dict(), tmp_path / "clip_image_enc.pt")
        again = models.load_noisy_clip(tmp_path, device="cpu")
        x, t = torch.ones(1, 3, 16, 16), torch.tensor([5])
        given = [each.similarity(each.encode_text(["a dog"]), x, t) for each in (clip, again)]
        assert torch.equal(*given)
        assert not any(parameter.requires_grad for parameter in again.parameters())
        half = models.load_noisy_clip(tmp_path, "bfloat16", "cpu")
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        torch.save(clip.text_encoder.state_dict(), tmp_path / "clip_image_enc.pt")
        with pytest.raises(ModelError, match="missing"):
            models.load_noisy_clip(tmp_path)


class TestFiles:
    @pytest.mark.parametrize("inpaints", [False, True])
    def test_what_is_saved_comes_back_equal(self, tmp_path: Path, inpaints: bool) -> None:
        model = tiny_glide(inpaints=inpaints)
        models.save(model, tmp_path / "small.safetensors")
        again = models.load(tmp_path / "small.safetensors")
        assert isinstance(again, GlideModel)
        for ours, theirs in ((model.unet, again.unet), (model.text, again.text)):
            assert ours.config == theirs.config
            assert all(torch.equal(theirs.state_dict()[name], t) for name, t in ours.state_dict().items())
        assert (again.schedule, again.resolution, again.inpaints) == (model.schedule, 16, inpaints)
        assert torch.equal(again.tokenizer.encode(["a large dog"]).ids, model.tokenizer.encode(["a large dog"]).ids)
        models.save(tiny_glide(1, inpaints=inpaints), tmp_path / "small.safetensors")            # replaced
        assert not torch.equal(models.load(tmp_path / "small.safetensors").unet.out[2].weight, model.unet.out[2].weight)
        with pytest.raises(ModelError, match="ends in '.pt'"):
            models.save(model, tmp_path / "small.pt")

    def test_a_folder_of_base_and_upsampler_is_a_cascade(self, tmp_path: Path) -> None:
        models.save(tiny_glide(), tmp_path / "base.safetensors")
        assert models.load(tmp_path).upsampler is None
        models.save(tiny_glide(1, factor=4), tmp_path / "upsample.safetensors")
        model = models.load(tmp_path, checkpointing="blocks", attention="sliced")
        assert (model.source, model.factor, model.upsampler.factor) == (str(tmp_path), 1, 4)
        assert (model.upsampler.checkpointing, model.upsampler.attention) == ("blocks", "sliced")
        assert torch.equal(model.upsampler.unet.out[2].weight, tiny_glide(1, factor=4).unet.out[2].weight)
        assert models.load(tmp_path, upsampler=False).upsampler is None

    def test_what_describes_itself_goes_before_a_bare_file(self, tmp_path: Path) -> None:
        (tmp_path / "base.pt").write_bytes(b"of another time")
        models.save(tiny_glide(), tmp_path / "base.safetensors")
        assert torch.equal(models.load(tmp_path).unet.out[2].weight, tiny_glide().unet.out[2].weight)

    def test_a_file_of_another_kind_is_called_by_its_name(self, tmp_path: Path) -> None:
        names = {"model.diffusion_model.out.2.weight": "a Stable Diffusion checkpoint", "x": "a file of no kind"}
        names |= {"input_blocks.0.0.weight": "a classifier of guided-diffusion"}
        for name, said in names.items():
            torch.save({name: torch.ones(1)}, tmp_path / "base.pt")
            with pytest.raises(ModelError, match=f"base.pt is {said}.*, and one of GLIDE's networks is needed"):
                read_glide(tmp_path / "base.pt", None, torch.device("cpu"))
        models.save(tiny_glide(), tmp_path / "small.safetensors")
        with pytest.raises(ModelError, match="no Stable Diffusion checkpoint, but one of GLIDE's networks"):
            read_single_file(tmp_path / "small.safetensors", None, torch.device("cpu"), None)

    def test_an_upsampler_alone_and_one_in_the_base_s_place(self, tmp_path: Path) -> None:
        models.save(tiny_glide(1, factor=4), tmp_path / "upsample.safetensors")
        with pytest.raises(ModelError, match=r"upsample\.safetensors and no base"):
            models.load(tmp_path)
        models.save(tiny_glide(1, factor=4), tmp_path / "base.safetensors")
        with pytest.raises(ModelError, match=r"base\.safetensors is an upsampler"):
            models.load(tmp_path)

    def test_a_folder_of_inpainting_files_is_one_too(self, tmp_path: Path) -> None:
        models.save(tiny_glide(inpaints=True), tmp_path / "base_inpaint.safetensors")
        models.save(tiny_glide(factor=4, inpaints=True), tmp_path / "upsample_inpaint.safetensors")
        model = models.load(tmp_path)
        assert (model.inpaints, model.upsampler.inpaints) == (True, True)
        models.save(tiny_glide(), tmp_path / "base.safetensors")
        assert not models.load(tmp_path).inpaints

    @pytest.mark.parametrize(
        "upsampler",
        [tiny_glide(), tiny_model(), tiny_glide(factor=4, inpaints=True)],
        ids=["base", "latent", "inpaint"],
    )
    def test_an_upsampler_that_is_none_for_this_model(self, upsampler: object) -> None:
        with pytest.raises(ModelError, match="does not enlarge what tiny GLIDE:0 draws|are for inpainting differ"):
            replace(tiny_glide(), upsampler=upsampler)
        with pytest.raises(ModelError, match="does not enlarge"):
            replace(tiny_glide(factor=4), upsampler=tiny_glide(factor=4))

    def test_what_it_predicts_is_kept(self, tmp_path: Path) -> None:
        models.save(replace(tiny_glide(), prediction="v_prediction"), tmp_path / "small.safetensors")
        assert models.load(tmp_path / "small.safetensors").prediction == "v_prediction"
        with pytest.raises(ModelError, match="predicts 'x'; known are epsilon, v_prediction"):
            replace(tiny_glide(), prediction="x")

    def test_stable_diffusion_s_options_are_refused(self, tmp_path: Path) -> None:
        models.save(tiny_glide(), tmp_path / "base.safetensors")
        for source in (tmp_path, tmp_path / "base.safetensors", "glide"):
            with pytest.raises(ModelError, match="has no use for prediction: leave it out"):
                models.load(source, prediction="v_prediction")
        with pytest.raises(ModelError, match="no layout 'bogus'"):
            models.save(tiny_glide(), tmp_path / "x.safetensors", "bogus")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"factor": "2"}, "factor is '2'"),
            ({"schedule": None}, "schedule is None"),
            ({"schedule": {"name": "bad"}}, "no schedule 'bad'"),
            ({"schedule": {"name": "linear", "steps": "x"}}, "steps is 'x'"),
            ({"resolution": "x"}, "resolution is 'x'"),
            ({"resolution": 0}, "resolution is 0"),
            ({"factor": True}, "factor is True"),
            ({"unet": {"attention": "nonsense"}}, "no attention is called 'nonsense'"),
            ({"unet": {"channel_mult": []}}, "does not describe a network of oneword.glide"),
            ({"unet": {"num_res_blocks": "2"}}, "does not describe a network of oneword.glide"),
            ({"unet": {"out_channels": -1}}, "does not describe a network of oneword.glide"),
        ],
    )
    def test_metadata_of_wrong_kinds(self, tmp_path: Path, change: dict, said: str) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        models.save(tiny_glide(), tmp_path / "small.safetensors")
        with safe_open(tmp_path / "small.safetensors", "pt") as file:
            tensors, described = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        known = json.loads(described["oneword.glide"])
        change = {key: known[key] | value if key == "unet" else value for key, value in change.items()}
        save_file(tensors, tmp_path / "x.safetensors", {"oneword.glide": json.dumps(known | change)})
        with pytest.raises(ModelError, match=said):
            models.load(tmp_path / "x.safetensors")

    def test_a_bare_file_of_no_published_network(self, tmp_path: Path) -> None:
        model = tiny_glide()
        torch.save(model.unet.state_dict() | model.text.state_dict(), tmp_path / "base.pt")
        with pytest.raises(ModelError, match="none of GLIDE's published networks"):
            models.load(tmp_path / "base.pt")

    def test_metadata_that_describes_nothing(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        model = tiny_glide()
        tensors = model.unet.state_dict() | model.text.state_dict()
        save_file(tensors, tmp_path / "x.safetensors", {"oneword.glide": "{}"})
        with pytest.raises(ModelError, match="does not describe a network"):
            models.load(tmp_path / "x.safetensors")

    def test_another_s_file_is_not_replaced(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match="exists"):
            models.save(tiny_glide(), tmp_path / "x.safetensors")
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(ModelError, match="exists"):
            models.save(tiny_glide(), tmp_path / "folder.safetensors")

    def test_failure_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(tiny_glide(), tmp_path / "small.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_lacks_a_tensor(self, tmp_path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        models.save(tiny_glide(), tmp_path / "small.safetensors")
        with safe_open(tmp_path / "small.safetensors", "pt") as file:
            tensors, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        del tensors["final_ln.bias"]
        save_file(tensors, tmp_path / "cut.safetensors", said)
        with pytest.raises(ModelError, match=r"final_ln\.bias \(32,\) is missing"):
            models.load(tmp_path / "cut.safetensors")
