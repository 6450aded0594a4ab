"""Loading, saving, and agreement with the libraries whose files are read.

The peers compute in float64 too. What is left is the order of summation, about 1e-15 a sum and grown by
depth: 1e-10 of the largest value is far above that and far below any mistake.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import LatentModel, ModelError, configs, hub, presets, weights
from models.files import Weights, metadata
from models.text import ClipText
from models.tokenizer import ClipTokenizer
from models.vae import VAE
from models.vocabulary import clip_vocabulary, from_merges
from models.weights import on_meta

AGREEMENT = 1e-10
ROOT = Path(__file__).parents[2]

# Form of Stable Diffusion -> what its UNet and text encoder are told, everything tiny.
UNETS: dict[str, dict[str, Any]] = {
    "1.x": {"attention_head_dim": 4},
    "2.x": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
}
TEXTS: dict[str, dict[str, Any]] = {"1.x": {"hidden_act": "quick_gelu"}, "2.x": {"hidden_act": "gelu"}}

# Subfolder -> every setting of its class, with its default.
DEFAULTS: dict[str, dict[str, Any]] = {
    part: {key: each.default for key, each in inspect.signature(kind).parameters.items()}
    for part, kind in (
        ("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL),
        ("scheduler", diffusers.DDIMScheduler),
    )
} | {"text_encoder": transformers.CLIPTextConfig().to_dict()}  # fmt: skip
TRANSLATED = {
    "unet": {
        "in_channels", "out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim",
        "transformer_layers_per_block", "use_linear_projection",
    },
    "vae": {"in_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor"},
    "text_encoder": {
        "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "max_position_embeddings",
    },
    "scheduler": {
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr",
    },
}  # fmt: skip
# What diffusers 0.42 knows besides that would change what is drawn.
REFUSED = {
    "unet": {
        "act_fn", "addition_embed_type", "attention_type", "center_input_sample", "class_embed_type", "conv_in_kernel",
        "conv_out_kernel", "cross_attention_norm", "downsample_padding", "dual_cross_attention", "encoder_hid_dim",
        "encoder_hid_dim_type", "flip_sin_to_cos", "freq_shift", "mid_block_only_cross_attention",
        "mid_block_scale_factor", "mid_block_type", "norm_eps", "num_class_embeds", "only_cross_attention",
        "resnet_out_scale_factor", "resnet_skip_time_act", "resnet_time_scale_shift",
        "reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim",
        "time_embedding_type", "timestep_post_act",
    },
    "vae": {
        "act_fn", "latents_mean", "latents_std", "mid_block_add_attention", "shift_factor", "use_post_quant_conv",
        "use_quant_conv",
    },
    "text_encoder": {"layer_norm_eps"}, "scheduler": {"trained_betas"},
}  # fmt: skip


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def disturb(network: torch.nn.Module) -> None:
    """Every parameter a little random, so that no norm is the identity and no bias is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


class Pipeline:
    """A tiny Stable Diffusion made by diffusers and transformers, and the folder that they saved it in."""

    def __init__(self, form: str, folder: Path) -> None:
        torch.manual_seed(0)
        tokens = ClipTokenizer(from_merges(clip_vocabulary().merges[:500]), 16, 0 if form == "2.x" else None)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **UNETS[form],
        )  # fmt: skip
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
            up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3, sample_size=16,
        )  # fmt: skip
        self.text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=tokens.vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=16, bos_token_id=tokens.begin,
                eos_token_id=tokens.end, **TEXTS[form],
            )
        )  # fmt: skip
        prediction = {"1.x": "epsilon", "2.x": "v_prediction"}[form]
        for part, network in (("unet", self.unet), ("vae", self.vae), ("text_encoder", self.text)):
            disturb(network)
            network.save_pretrained(folder / part)
            network.double().eval()
        diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction
        ).save_pretrained(folder / "scheduler")
        tokens.save(folder / "tokenizer")
        self.folder, self.form, self.tokenizer = folder, form, tokens


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(request.param, tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def ours(peer: Pipeline) -> LatentModel:
    return models.load(peer.folder, dtype=torch.float64, device="cpu")


@pytest.fixture
def copy(peer: Pipeline, tmp_path: Path) -> Path:
    """A copy of the peer's folder, to be changed."""
    return Path(shutil.copytree(peer.folder, tmp_path / "copy"))


class TestAgainstDiffusers:
    def test_what_it_is(self, ours: LatentModel, peer: Pipeline) -> None:
        assert ours.prediction == ("epsilon" if peer.form == "1.x" else "v_prediction")
        assert ours.schedule == presets.SD_SCHEDULE
        assert (ours.resolution, ours.width, ours.source) == (16, 48, str(peer.folder))
        assert (ours.unet.config.num_heads, ours.unet.config.head_channels) == (
            (4, None) if peer.form == "1.x" else (None, 16)
        )

    def test_unet(self, ours: LatentModel, peer: Pipeline) -> None:
        x_t, t, context = (
            torch.randn(2, 4, 8, 12).double(),
            torch.tensor([3, 977]),
            torch.randn(2, 16, 48).double(),
        )
        with torch.no_grad():
            theirs = peer.unet(x_t, t, context).sample
        assert off(ours.predict(x_t, t, models.TextFeatures(context)), theirs) < AGREEMENT

    def test_unet_of_other_norms(self, copy: Path, tmp_path: Path) -> None:
        file = copy / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"norm_num_groups": 4}))
        models.save(models.load(copy, dtype=torch.float64, device="cpu"), tmp_path / "again")
        ours = models.load(tmp_path / "again", device="cpu")
        peer = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet").double().eval()
        x_t, t, context = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 977]), torch.randn(2, 16, 48).double()
        with torch.no_grad():
            theirs = peer(x_t, t, context).sample
        assert off(ours.predict(x_t, t, models.TextFeatures(context)), theirs) < AGREEMENT

    def test_images_are_drawn_as_its_pipeline_does_by_default(self, ours: LatentModel) -> None:
        theirs = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
        assert ours.sampling.scale == theirs["guidance_scale"].default
        assert ours.sampling.steps == theirs["num_inference_steps"].default

    def test_moments(self, ours: LatentModel, peer: Pipeline) -> None:
        images = torch.rand(2, 3, 16, 24).double() * 2 - 1
        with torch.no_grad():
            theirs = peer.vae.encode(images).latent_dist.parameters
        assert off(ours.moments(images), theirs) < AGREEMENT

    def test_decoding(self, ours: LatentModel, peer: Pipeline) -> None:
        x0 = torch.randn(2, 4, 8, 12).double()
        with torch.no_grad():
            theirs = peer.vae.decode(x0 / 0.3).sample
        assert off(ours.vae.decode(x0), theirs) < AGREEMENT
        assert torch.equal(ours.decode(x0), ours.vae.decode(x0).clamp(-1, 1))

    def test_drawing_a_latent(self, ours: LatentModel, peer: Pipeline) -> None:
        moments, noise = torch.randn(2, 8, 4, 4).double() * 20, torch.randn(2, 4, 4, 4).double()
        distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
        theirs = 0.3 * (distribution.mean + distribution.std * noise)
        assert off(ours.draw_x0(moments, noise), theirs) < AGREEMENT

    def test_text(self, ours: LatentModel, peer: Pipeline) -> None:
        tokens = ours.tokenizer.encode(["a picture of a dog", "", "the snow"])
        with torch.no_grad():
            theirs = peer.text(tokens.ids).last_hidden_state
        assert off(ours.encode_text(tokens).context, theirs) < AGREEMENT

    def test_gradient_on_learned_vectors(self, ours: LatentModel, peer: Pipeline) -> None:
        """Against the usual way: a table with more rows, trained as a whole."""
        size, vectors = ours.tokenizer.vocab_size, torch.randn(3, 48).double()
        tokens = ours.tokenizer.encode(["a <x> and <x>", "in <y> style"], {"<x>": 2, "<y>": 1})
        target = torch.randn(2, 16, 48).double()

        extended = transformers.CLIPTextModel(peer.text.config).double()
        extended.load_state_dict(peer.text.state_dict())
        extended.resize_token_embeddings(size + 3, mean_resizing=False)
        with torch.no_grad():
            extended.get_input_embeddings().weight[size:] = vectors
        loss = (extended(tokens.ids).last_hidden_state - target).square().mean()
        theirs = torch.autograd.grad(loss, extended.get_input_embeddings().weight)[0][size:]

        vectors.requires_grad_()
        loss = (ours.encode_text(tokens, vectors).context - target).square().mean()
        assert off(torch.autograd.grad(loss, vectors)[0], theirs) < AGREEMENT
        assert all(row.abs().max() > 0 for row in theirs)

    def test_embedding(self, ours: LatentModel, peer: Pipeline) -> None:
        row = ours.embedding(320)
        assert row.dtype == torch.float32
        assert torch.equal(row, peer.text.get_input_embeddings().weight[320].float())


class TestFolders:
    @pytest.mark.parametrize("prefixed", [True, False])
    def test_both_namings_of_the_text_encoder(self, ours: LatentModel, copy: Path, prefixed: bool) -> None:
        file = copy / "text_encoder" / "model.safetensors"
        bare = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
        save_file({("text_model." if prefixed else "") + name: tensor for name, tensor in bare.items()}, file)
        model = models.load(copy, dtype=torch.float64)
        assert model.names["text"] == ("diffusers" if prefixed else "diffusers flat")
        assert_equal(model, ours)

    def test_old_names_of_the_vaes_attention(self, ours: LatentModel, copy: Path) -> None:
        file = copy / "vae" / "diffusion_pytorch_model.safetensors"
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(file)
        for new, name in old.items():
            tensors = {
                key.replace(f"attentions.0.{new}", f"attentions.0.{name}"): t for key, t in tensors.items()
            }
        save_file(tensors, file)
        model = models.load(copy, dtype=torch.float64)
        assert_equal(model, ours)
        models.save(models.load(copy), copy.parent / "again")
        assert_same_tensors(copy.parent / "again" / "vae" / "diffusion_pytorch_model.safetensors", file)

    def test_tensors_are_mapped_once_and_named_once(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened, named = [], []
        open_weights, stored = Weights.open, weights.stored
        monkeypatch.setattr(Weights, "open", lambda self, *only: opened.append(self) or open_weights(self, *only))
        monkeypatch.setattr(weights, "stored", lambda *args: named.append(args) or stored(*args))
        models.load(copy, device="cpu")
        assert len(opened) == 3
        assert len(named) == 1 + 2 + 2                              # of a UNet, a VAE and a text, in as many layouts

    def test_pickled_weights(self, ours: LatentModel, copy: Path) -> None:
        for file in list(copy.rglob("*.safetensors")):
            stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
            torch.save(load_file(file), file.with_name(f"{stem}.bin"))
            file.unlink()
        assert_equal(models.load(copy, dtype=torch.float64), ours)

    def test_a_variant(self, ours: LatentModel, copy: Path) -> None:
        for file in list(copy.rglob("*.safetensors")):
            save_file(
                {k: t.half() for k, t in load_file(file).items()},
                file.with_name(f"{file.stem}.fp16.safetensors"),
            )
            file.unlink()
        with pytest.raises(ModelError, match="it does hold variant='fp16'"):
            models.load(copy)
        model = models.load(copy, variant="fp16")
        assert model.dtype == torch.float32  # float16 in the file, and this is a CPU
        assert all(
            torch.equal(p, q.half().float()) for p, q in zip(model.unet.parameters(), ours.unet.parameters())
        )

    def test_without_tokenizer_or_scheduler_prediction_is_asked_for(self, copy: Path) -> None:
        shutil.rmtree(copy / "scheduler")
        with pytest.raises(ModelError, match="does not say what it predicts"):
            models.load(copy)
        assert models.load(copy, prediction="v_prediction").prediction == "v_prediction"

    @pytest.mark.parametrize(
        ("preset", "pad", "prediction"), [(presets.SD1, 49407, "epsilon"), (presets.SD2_V, 0, None)]
    )
    def test_without_tokenizer_and_scheduler_the_text_tells(
        self, tmp_path: Path, preset: presets.Preset, pad: int, prediction: str | None
    ) -> None:
        """Stable Diffusion 1.x is padded with the end token and predicts epsilon, 2.x with "!" and either."""
        for part, said in (
            ("unet", configs.write_unet(preset.unet, 64)), ("vae", configs.write_vae(preset.vae, 512)),
            ("text_encoder", configs.write_text(preset.text, 49406, 49407, pad)),
        ):  # fmt: skip
            (tmp_path / part).mkdir()
            (tmp_path / part / "config.json").write_text(json.dumps(said))
        if prediction is None:
            with pytest.raises(ModelError, match="does not say what it predicts"):
                models.outline(tmp_path)
        model = models.outline(tmp_path, None if prediction else "v_prediction")
        assert model.prediction == (prediction or "v_prediction")
        assert (model.tokenizer.pad, model.schedule) == (pad, presets.SD_SCHEDULE)

    def test_a_square_sample_size(self, ours: LatentModel, copy: Path) -> None:
        file = copy / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": [8, 8]}))
        assert models.outline(copy).resolution == ours.resolution

    def test_the_callers_prediction_wins(self, copy: Path) -> None:
        assert models.load(copy, prediction="v_prediction").prediction == "v_prediction"
        with pytest.raises(ModelError, match="'sample'"):
            models.load(copy, prediction="sample")

    def test_auto(self, copy: Path) -> None:
        assert models.load(copy, dtype="auto", device="cpu").dtype in (torch.bfloat16, torch.float32)

    def test_no_dtype(self, copy: Path) -> None:
        with pytest.raises(ModelError, match="'stored' is no dtype to run a model in"):
            models.load(copy, dtype="stored", device="cpu")

    def test_float16_on_a_cpu(self, copy: Path) -> None:
        with pytest.raises(ModelError, match="hundreds of times slower"):
            models.load(copy, dtype=torch.float16, device="cpu")

    @pytest.mark.parametrize(
        ("part", "key", "value"),
        [
            ("unet", "act_fn", "gelu"), ("unet", "class_embed_type", "timestep"), ("unet", "norm_eps", 1e-6),
            ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
            ("unet", "attention_head_dim", [3, 5]),
            ("unet", "block_out_channels", [64, 96]), ("unet", "layers_per_block", [1, 2]),
            ("unet", "cross_attention_dim", None), ("vae", "shift_factor", 0.1),
            ("vae", "use_quant_conv", False),
            ("text_encoder", "hidden_act", "relu"), ("text_encoder", "layer_norm_eps", 1e-6),
            ("scheduler", "trained_betas", [0.1, 0.2]), ("scheduler", "prediction_type", "sample"),
        ],
    )  # fmt: skip
    def test_settings_that_are_not_supported_are_named(
        self, copy: Path, part: str, key: str, value: Any
    ) -> None:
        file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(ModelError) as error:
            models.load(copy)
        assert part in str(error.value) or key == "prediction_type"

    @pytest.mark.parametrize(("part", "key"), sorted((part, key) for part in REFUSED for key in REFUSED[part]))
    def test_every_setting_that_would_be_ignored_is_refused_by_name(self, peer: Pipeline, part: str, key: str) -> None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = json.loads((peer.folder / part / name).read_text()) | {key: "another"}
        read = {"unet": configs.read_unet, "vae": configs.read_vae, "text_encoder": configs.read_text}
        with pytest.raises(ModelError, match=f"here: {key} is 'another'; only"):
            read.get(part, configs.read_schedule)(file, "here")

    @pytest.mark.parametrize(("part", "key"), sorted((part, key) for part in TRANSLATED for key in TRANSLATED[part]))
    def test_what_is_not_said_is_the_default_of_the_library(self, copy: Path, part: str, key: str) -> None:
        file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        said = {name: value for name, value in json.loads(file.read_text()).items() if name != key}
        found = []
        for each in (said, said | {key: DEFAULTS[part][key]}):
            file.write_text(json.dumps(each))
            found.append(numbers(models.outline(copy)))
        assert found[0] == found[1]

    def test_the_number_of_heads_by_its_right_name_comes_first(self, copy: Path) -> None:
        file = copy / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 16}))
        assert models.outline(copy).unet.config.num_heads == 16

    def test_parts_that_do_not_fit_each_other(self, copy: Path) -> None:
        file = copy / "unet" / "config.json"
        for key, value, said in (
            ("cross_attention_dim", 32, "text's width differ, 32 and 48"),
            ("in_channels", 9, "inpainting"),
            ("out_channels", 8, "output channels"),
        ):
            written = file.read_text()
            file.write_text(json.dumps(json.loads(written) | {key: value}))
            with pytest.raises(ModelError, match=said):
                models.load(copy)
            file.write_text(written)
        ClipTokenizer.train(["a"], 600).save(copy / "tokenizer")
        with pytest.raises(ModelError, match="vocabulary"):
            models.load(copy)

    @pytest.mark.parametrize("what", ["unet/config.json", "text_encoder/config.json", "unet", "vae"])
    def test_what_is_missing_is_named(self, copy: Path, what: str) -> None:
        shutil.rmtree(copy / what) if (copy / what).is_dir() else (copy / what).unlink()
        with pytest.raises(ModelError, match=what):
            models.load(copy)

    def test_a_missing_weight_is_named(self, copy: Path) -> None:
        file = copy / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        del tensors["conv_in.bias"]
        save_file(tensors, file)
        with pytest.raises(ModelError, match=r"conv_in\.bias \(32,\) is missing"):
            models.load(copy)

    def test_other_families_are_told_apart(self, copy: Path) -> None:
        (copy / "text_encoder_2").mkdir()
        with pytest.raises(ModelError, match="text_encoder_2"):
            models.load(copy)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="a model folder has"):
            models.load(tmp_path)

    @pytest.mark.parametrize(
        ("file", "content", "said"),
        [
            ("unet/config.json", "[]", "holds a list"),
            ("tokenizer/vocab.json", "[]", "holds a list"),
            ("tokenizer/merges.txt", "#version: 0.2\nqqq zzz\n", "do not fit each other"),
        ],
    )
    def test_json_of_another_kind(self, copy: Path, file: str, content: str, said: str) -> None:
        (copy / file).write_text(content)
        with pytest.raises(ModelError, match=said):
            models.load(copy)

    @pytest.mark.parametrize(
        ("file", "setting", "said"),
        [
            ("unet", {"block_out_channels": "x"}, "unet.* value of a wrong kind"),
            ("unet", {"attention_head_dim": [0, 1]}, "unet.* value of a wrong kind"),
            ("unet", {"sample_size": "x"}, "unet.* value of a wrong kind"),
            ("unet", {"attention_head_dim": 5}, "has 32 channels, no multiple of 5"),
            ("unet", {"attention_head_dim": [2, 4, 4]}, r"\[2, 4, 4\] heads over \[32, 64\] channels"),
            ("unet", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "their mirror image are supported"),
            ("unet", {"norm_num_groups": 5}, r"has 32 channels, no multiple of 5 \(norm_groups\)"),
            ("text_encoder", {"num_attention_heads": 5}, "cannot be divided among 5 heads"),
            ("unet", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; only one number"),
            ("unet", {"norm_num_groups": None}, "unet.* value of a wrong kind"),
            ("unet", {"in_channels": None}, "unet.* value of a wrong kind"),
            ("vae", {"layers_per_block": [1, 1]}, "vae.* value of a wrong kind"),
            ("vae", {"block_out_channels": []}, "vae.* value of a wrong kind"),
            ("vae", {"scaling_factor": None}, "vae.* value of a wrong kind"),
            ("text_encoder", {"num_hidden_layers": None}, "text_encoder.* value of a wrong kind"),
            ("text_encoder", {"vocab_size": -1}, "text_encoder.* value of a wrong kind"),
            ("scheduler", {"beta_schedule": "foo"}, "no schedule 'foo' is known"),
        ],
    )
    def test_settings_of_no_use(self, copy: Path, file: str, setting: dict, said: str) -> None:
        name = copy / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
        name.write_text(json.dumps(json.loads(name.read_text()) | setting))
        with pytest.raises(ModelError, match=said):
            models.load(copy)

    @pytest.mark.parametrize(
        "scheduler",
        [
            "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler",
            "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler",
        ],
    )  # fmt: skip
    def test_schedulers_of_another_process(self, copy: Path, scheduler: str) -> None:
        shutil.rmtree(copy / "scheduler")
        getattr(diffusers, scheduler)().save_pretrained(copy / "scheduler")
        with pytest.raises(ModelError, match=f"has no betas: it is of {scheduler}, for flow matching or"):
            models.load(copy)

    @pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
    def test_flow_matching_of_schedulers_that_know_betas_too(self, copy: Path, scheduler: str) -> None:
        shutil.rmtree(copy / "scheduler")
        getattr(diffusers, scheduler)(use_flow_sigmas=True).save_pretrained(copy / "scheduler")
        with pytest.raises(ModelError, match="use_flow_sigmas is True; only False"):
            models.load(copy)

    def test_a_schedule_that_no_class_wrote_has_the_usual_betas(self, copy: Path) -> None:
        (copy / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
        found = models.load(copy)
        usual = diffusers.DDIMScheduler().config
        assert found.prediction == "v_prediction"
        assert found.schedule["name"] == usual.beta_schedule
        assert (found.schedule["beta_start"], found.schedule["beta_end"]) == (usual.beta_start, usual.beta_end)

    def test_a_thousand_betas_are_not_all_told(self, copy: Path) -> None:
        file = copy / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_betas": [0.1] * 1000}))
        with pytest.raises(ModelError, match="trained_betas is") as error:
            models.load(copy)
        assert len(str(error.value)) < 300 + len(str(file))

    def test_broken_json(self, copy: Path) -> None:
        (copy / "vae" / "config.json").write_text("{")
        with pytest.raises(ModelError, match="not readable JSON"):
            models.load(copy)


def numbers(model: LatentModel) -> tuple[Any, ...]:
    """All that configurations say of a model."""
    networks = model.unet, model.vae, model.text
    return *(each.config for each in networks), model.tokenizer.length, model.schedule, model.prediction


def assert_equal(a: LatentModel, b: LatentModel) -> None:
    for x, y in ((a.unet, b.unet), (a.vae, b.vae), (a.text, b.text)):
        assert x.config == y.config
        assert x.state_dict().keys() == y.state_dict().keys()
        for name, tensor in x.state_dict().items():
            assert torch.equal(tensor, y.state_dict()[name]), name


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


def as_list(setting: Any) -> Any:
    return list(setting) if isinstance(setting, tuple) else setting  # JSON has no tuples


class TestSavingFolders:
    def test_what_went_in_comes_out_equal(self, copy: Path, tmp_path: Path) -> None:
        file = copy / "text_encoder" / "model.safetensors"
        positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        flat = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}
        save_file(flat | positions, file)
        model = models.load(copy)
        models.save(model, tmp_path / "again")
        for file in copy.rglob("*.safetensors"):
            assert_same_tensors(tmp_path / "again" / file.relative_to(copy), file)
        again = models.load(tmp_path / "again")
        assert_equal(again, model)
        assert (again.schedule, again.prediction, again.resolution) == (model.schedule, model.prediction, 16)
        assert again.tokenizer.vocabulary == model.tokenizer.vocabulary
        assert again.tokenizer.pad == model.tokenizer.pad

    def test_diffusers_reads_it(self, peer: Pipeline, tmp_path: Path) -> None:
        models.save(models.load(peer.folder), tmp_path / "again")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
        for ours, theirs in ((pipe.unet, peer.unet), (pipe.vae, peer.vae), (pipe.text_encoder, peer.text)):
            assert ours.state_dict().keys() == theirs.state_dict().keys()
            assert all(torch.equal(t, theirs.state_dict()[n].float()) for n, t in ours.state_dict().items())
        for key in (
            "attention_head_dim", "block_out_channels", "use_linear_projection", "down_block_types", "upcast_attention"
        ):
            assert as_list(pipe.unet.config[key]) == as_list(peer.unet.config[key]), key
        assert pipe.scheduler.config.prediction_type == ("epsilon" if peer.form == "1.x" else "v_prediction")
        said = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}         # as published files do
        alone = diffusers.DDIMScheduler.from_pretrained(tmp_path / "again" / "scheduler")   # a pipeline corrects it
        assert {key: alone.config[key] for key in said} == said
        text, tokens = pipe.text_encoder.config, peer.tokenizer
        assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (tokens.begin, tokens.end, tokens.pad)
        assert pipe.tokenizer("a dog", padding="max_length")["input_ids"] == (
            peer.tokenizer.encode(["a dog"]).ids[0].tolist()
        )

    def test_in_another_dtype(self, peer: Pipeline, tmp_path: Path) -> None:
        models.save(models.load(peer.folder), tmp_path / "half", dtype=torch.float16)
        dtypes = {
            t.dtype for file in (tmp_path / "half").rglob("*.safetensors") for t in load_file(file).values()
        }
        assert dtypes == {torch.float16}

    def test_a_model_folder_is_replaced_and_nothing_is_left_beside(self, copy: Path) -> None:
        """What a downloaded pipeline has beside the model stays; an old file of the model's own parts would mislead."""
        model = models.load(copy)
        (copy / "model_index.json").write_text("{}")
        (copy / "README.md").write_text("mine")
        (copy / "safety_checker").mkdir()
        (copy / "safety_checker" / "config.json").write_text("{}")
        (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
        models.save(model, copy)
        assert (copy / "README.md").read_text() == "mine"
        assert (copy / "safety_checker" / "config.json").exists()
        assert [f.name for f in (copy / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
        assert [file.name for file in copy.parent.iterdir()] == ["copy"]
        assert_equal(models.load(copy), model)  # the model still reads from the files that were replaced

    def test_through_a_link_it_is_the_folder_behind_it_that_is_replaced(self, copy: Path) -> None:
        model, link = models.load(copy), copy.with_name("latest")
        link.symlink_to(copy.name)
        (copy / "model_index.json").write_text("{}")
        (copy / "unet" / "old.txt").touch()
        models.save(model, link)
        assert link.is_symlink()
        assert not (copy / "unet" / "old.txt").exists()
        assert sorted(file.name for file in copy.parent.iterdir()) == ["copy", "latest"]

    def test_the_working_folder_stays(self, peer: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError, match="holds the working folder, which cannot be replaced"):
            models.save(models.load(peer.folder), ".")
        assert not any(tmp_path.iterdir())
        models.save(models.load(peer.folder), "model")
        monkeypatch.chdir(tmp_path / "model" / "unet")
        with pytest.raises(ModelError, match="holds the working folder"):
            models.save(models.load(peer.folder), "..")
        assert os.getcwd() == str(tmp_path / "model" / "unet")

    def test_other_content_is_left_alone(self, peer: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").touch()
        with pytest.raises(ModelError, match="not a model folder"):
            models.save(models.load(peer.folder), tmp_path / "run")
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.json"]

    def test_failure_leaves_nothing(
        self, peer: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        model = models.load(peer.folder)
        monkeypatch.setattr("models.configs.write_schedule", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(model, tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_failure_of_the_last_step_leaves_what_is_the_user_s(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = os.replace

        def fail(source: Path, place: Path) -> None:
            if Path(place) == copy and ".part" in Path(source).name:
                raise OSError("disk full")
            replace(source, place)

        model = models.load(copy)
        (copy / "model_index.json").write_text("{}")
        (copy / "README.md").write_text("mine")
        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(model, copy)
        assert (copy / "README.md").read_text() == "mine"
        assert [file.name for file in copy.parent.iterdir()] == ["copy"]
        assert_equal(models.load(copy), model)

    def test_a_stem_that_diffusers_cannot_say(self, tmp_path: Path) -> None:
        wide = replace(presets.TINY, unet=replace(presets.TINY.unet, channel_mult=(2, 4)))
        with pytest.raises(ModelError, match="begin with 1"):
            models.save(presets.untrained(wide), tmp_path / "model")

    def test_a_layout_that_there_is_not(self, peer: Pipeline, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="'diffusers' or 'single'"):
            models.save(models.load(peer.folder), tmp_path / "x", "ggml")


def single(form: str) -> presets.Preset:
    """A model as small as a single file can say what it is: its text has the family's width."""
    tiny, sd = presets.TINY, presets.SD1 if form == "1.x" else presets.SD2_V
    text = replace(sd.text, layers=2, mlp_width=64)
    heads = {"num_heads": 8} if form == "1.x" else {"num_heads": None, "head_channels": 64}
    channels = 64 if form == "2.x" else 32
    unet = replace(
        tiny.unet, model_channels=channels, context_dim=text.width, linear_proj=form == "2.x", **heads
    )
    return replace(sd, unet=unet, vae=tiny.vae, text=text)


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def model(request: pytest.FixtureRequest) -> LatentModel:
    torch.manual_seed(0)
    model = presets.untrained(single(request.param))
    for network in (model.unet, model.vae, model.text):
        disturb(network.bfloat16())  # half the bytes: the token table alone has 40 million numbers
    return model


@pytest.fixture(scope="module")
def file(model: LatentModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    models.save(model, path, "single")
    return path


OPENCLIP = "cond_stage_model.model."
KEPT: dict[str, dict[str, Callable[[], Tensor]]] = {
    "sd1": {
        "betas": lambda: torch.linspace(0, 1, 1000, dtype=torch.float64),
        "model_ema.diffusion_modelinput_blocks00weight": lambda: torch.randn(3),
        "cond_stage_model.logit_scale": lambda: torch.tensor(4.6),                       # these three as ComfyUI saves
        "cond_stage_model.text_projection": lambda: torch.randn(8, 8),
        "cond_stage_model.transformer.text_projection.weight": lambda: torch.randn(8, 8),
        "model_ema.num_updates": lambda: torch.tensor(7, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": lambda: torch.arange(77)[None],
    },
    "sd2": {
        "sqrt_one_minus_alphas_cumprod": lambda: torch.rand(1000),
        # as diffusers' convert_diffusers_to_original_stable_diffusion.py leaves it
        OPENCLIP + "transformer.text_model.embeddings.position_ids": lambda: torch.arange(77)[None],
        OPENCLIP + "logit_scale": lambda: torch.tensor(4.6),
        OPENCLIP + "text_projection": lambda: torch.randn(8, 8),
        OPENCLIP + "attn_mask": lambda: torch.zeros(77, 77),
        OPENCLIP + "transformer.resblocks.2.ln_1.weight": lambda: torch.randn(8),
    },
}


class TestSingleFiles:
    def test_round_trip(self, model: LatentModel, file: Path) -> None:
        again = models.load(file)
        assert_equal(again, model)
        assert (again.family, again.prediction) == (model.family, model.prediction)
        assert again.resolution == (512 if model.family == "sd1" else 768)
        assert models.load(file, prediction="v_prediction").resolution == again.resolution     # of 1.x that is unusual
        assert again.tokenizer.pad == (49407 if model.family == "sd1" else 0)
        assert again.schedule == presets.SD_SCHEDULE

    def test_a_published_file_comes_out_equal(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        tensors = load_file(file) | {name: make() for name, make in KEPT[model.family].items()}
        torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.ckpt")
        loaded = models.load(tmp_path / "a.ckpt", prediction=model.prediction)
        assert_equal(loaded, model)
        models.save(loaded, tmp_path / "b.safetensors", "single")
        written = load_file(tmp_path / "b.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensors[name]) for name in tensors)

    def test_other_names_of_the_text_transformer(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        old, new = {
            "sd1": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),     # of old merges
            "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),                      # SD-Turbo
        }[model.family]
        extra = {f"{new}embeddings.position_ids": torch.arange(77)[None]}
        renamed = {name.replace(old, new): tensor for name, tensor in load_file(file).items()} | extra
        save_file(renamed, tmp_path / "a.safetensors")
        loaded = models.load(tmp_path / "a.safetensors", prediction=model.prediction)
        assert_equal(loaded, model)
        models.save(loaded, tmp_path / "b.safetensors", "single")
        assert_same_tensors(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
        models.save(loaded, tmp_path / "folder")
        assert_equal(models.load(tmp_path / "folder"), model)

    def test_from_one_layout_to_the_other(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        models.save(models.load(file), tmp_path / "folder")
        folder = models.load(tmp_path / "folder")
        assert_equal(folder, model)
        assert (folder.family, folder.resolution) == (model.family, model.resolution)
        assert folder.tokenizer.pad == model.tokenizer.pad
        models.save(folder, tmp_path / "file.safetensors", "single")
        assert_same_tensors(tmp_path / "file.safetensors", file)

    def test_prediction(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        said = "epsilon" if model.family == "sd1" else "v"                                # the specification's words
        assert metadata(file)["modelspec.prediction_type"] == said
        save_file(load_file(file), tmp_path / "silent.safetensors")
        if model.family == "sd1":
            assert models.load(tmp_path / "silent.safetensors").prediction == "epsilon"
            return
        with pytest.raises(ModelError, match="'v_prediction' for a 768-pixel model, 'epsilon' for a 512"):
            models.load(tmp_path / "silent.safetensors")
        base = models.load(tmp_path / "silent.safetensors", prediction="epsilon")
        assert (base.prediction, base.resolution) == ("epsilon", 512)

    @pytest.mark.parametrize(
        ("spec", "prediction"),
        [
            ({"modelspec.predict_key": "v"}, "v_prediction"), ({"modelspec.predict_key": "epsilon"}, "epsilon"),
            ({"modelspec.prediction_type": "v_prediction"}, "v_prediction"),
        ],
    )  # fmt: skip
    def test_prediction_in_other_words(self, file: Path, tmp_path: Path, spec: dict, prediction: str) -> None:
        save_file(load_file(file), tmp_path / "said.safetensors", spec)
        assert models.load(tmp_path / "said.safetensors").prediction == prediction

    def test_a_prediction_that_is_not_known(self, file: Path, tmp_path: Path) -> None:
        save_file(load_file(file), tmp_path / "flow.safetensors", {"modelspec.prediction_type": "velocity"})
        with pytest.raises(ModelError, match="says that it predicts 'velocity'; known are v, epsilon"):
            models.load(tmp_path / "flow.safetensors")
        assert models.load(tmp_path / "flow.safetensors", prediction="epsilon").prediction == "epsilon"

    def test_empty_tensors_tell_v_and_zero_terminal_snr(self, file: Path, tmp_path: Path) -> None:
        marked = load_file(file) | {"v_pred": torch.empty(0)}
        save_file(marked, tmp_path / "v.safetensors")
        found = models.load(tmp_path / "v.safetensors")
        assert (found.prediction, found.schedule) == ("v_prediction", presets.SD_SCHEDULE)
        save_file(marked | {"ztsnr": torch.empty(0)}, tmp_path / "zero.safetensors")
        found = models.load(tmp_path / "zero.safetensors")
        assert found.schedule == presets.SD_SCHEDULE | {"zero_terminal_snr": True}
        models.save(found, tmp_path / "again.safetensors", "single")
        again = models.load(tmp_path / "again.safetensors")
        assert (again.prediction, again.schedule) == (found.prediction, found.schedule)
        models.save(found, tmp_path / "folder")
        assert models.load(tmp_path / "folder").schedule["zero_terminal_snr"] is True
        found.schedule = dict(presets.SD_SCHEDULE)
        with pytest.raises(ModelError, match="cannot hold the noise schedule"):
            models.save(found, tmp_path / "other.safetensors", "single")

    def test_what_is_wrong_is_named(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        tensors, bad = load_file(file), tmp_path / "bad.safetensors"
        for name, tensor, said in (
            ("model.diffusion_model.out.2.bias", None, "is missing"),
            ("model.diffusion_model.input_blocks.0.0.weight", None, "is missing"),
            ("model.diffusion_model.input_blocks.0.0.weight", torch.ones(3), "has shape"),
            (
                "first_stage_model.quant_conv.weight",
                torch.ones(8, 4, 1, 1),
                r"\(8, 4, 1, 1\), expected \(8, 8, 1, 1\)",
            ),
            ("control_model.x", torch.ones(2), "is not known"),
        ):
            changed = {k: t for k, t in tensors.items() if k != name} | (
                {} if tensor is None else {name: tensor}
            )
            save_file(changed, bad)
            with pytest.raises(ModelError, match=f"{name}.*{said}"):
                models.load(bad, prediction="epsilon")

    def test_other_files(self, tmp_path: Path) -> None:
        save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "word.safetensors")
        with pytest.raises(ModelError, match="no Stable Diffusion checkpoint"):
            models.load(tmp_path / "word.safetensors")
        xl = {"conditioner.embedders.0.x": torch.ones(1), "model.diffusion_model.out.2.bias": torch.ones(4)}
        refiner = xl | {"conditioner.embedders.0.model.token_embedding.weight": torch.ones(2, 1280)}
        for tensors in (xl, refiner):
            save_file(tensors, tmp_path / "xl.safetensors")
            with pytest.raises(ModelError, match="Stable Diffusion XL"):
                models.load(tmp_path / "xl.safetensors")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
            ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "a LoRA"),
            ("unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight", "a LoRA"),
            ("down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight", "a LoRA"),
            ("transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight", "a LoRA"),
            ("control_model.input_blocks.0.0.weight", "a ControlNet"),
            ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
            ("encoder.conv_in.weight", "a VAE alone"), ("first_stage_model.decoder.mid.attn_1.q.weight", "a VAE alone"),
            ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
            ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "a text encoder alone"),
            ("mid_block.resnets.0.conv1.weight", "a UNet alone"),
            ("middle_block.1.transformer_blocks.0.attn2.to_k.weight", "a UNet alone"),
            ("emb_params", "a learned word"), ("<frida>", "a learned word"),
            ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3"),
            ("double_blocks.0.img_attn.qkv.weight", "Flux"), ("x", "none of the kinds"),
        ],
    )  # fmt: skip
    def test_other_files_are_called_by_what_they_are(self, tmp_path: Path, name: str, said: str) -> None:
        save_file({name: torch.ones(1, 8)}, tmp_path / "a.safetensors")
        with pytest.raises(ModelError, match=f"is no Stable Diffusion checkpoint, but .*{said}.*: a file of 1.x or"):
            models.load(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("lost", ["first_stage_model.", "cond_stage_model."])
    def test_a_file_without_one_of_the_networks(self, file: Path, tmp_path: Path, lost: str) -> None:
        left = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}
        save_file(left, tmp_path / "a.safetensors")
        with pytest.raises(ModelError, match=rf"has no tensor under {lost}.*: a whole model is needed"):
            models.load(tmp_path / "a.safetensors")

    def test_an_empty_tensor(self, file: Path, tmp_path: Path) -> None:
        for name in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"):
            save_file(load_file(file) | {name: torch.ones(0, 4, 3, 3)}, tmp_path / "a.safetensors")
            with pytest.raises(ModelError, match=f"{name} is empty"):
                models.load(tmp_path / "a.safetensors")

    def test_an_existing_file_is_left_alone(self, model: LatentModel, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_text("mine")
        with pytest.raises(ModelError, match="exists"):
            models.save(model, tmp_path / "model.safetensors", "single")
        with pytest.raises(ModelError, match=r"written as \.safetensors"):
            models.save(model, tmp_path / "model.ckpt", "single")
        assert (tmp_path / "model.safetensors").read_text() == "mine"

    def test_failure_leaves_nothing(self, model: LatentModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(model, tmp_path / "model.safetensors", "single")
        assert list(tmp_path.iterdir()) == []

    def test_what_a_single_file_cannot_say_is_refused(self, model: LatentModel, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="neither Stable Diffusion 1.x"):
            models.save(presets.untrained(presets.TINY), tmp_path / "tiny.safetensors", "single")
        vae, text, merges = model.vae.config, model.text.config, model.tokenizer.vocabulary.merges
        swapped = ClipTokenizer(from_merges([*merges[:-2], merges[-1], merges[-2]]), text.length, model.tokenizer.pad)
        for what, other in (
            ("the VAE", {"vae": on_meta(lambda: VAE(replace(vae, scale=0.3)))}),
            ("the text transformer", {"text": on_meta(lambda: ClipText(replace(text, heads=1)))}),
            ("the vocabulary", {"tokenizer": swapped}),
            ("the noise schedule", {"schedule": {"name": "linear"}}),
        ):
            with pytest.raises(ModelError, match=f"cannot hold {what} of"):
                models.save(LatentModel(**dict(vars(model)) | other), tmp_path / "other.safetensors", "single")
        assert list(tmp_path.iterdir()) == []


class TestNames:
    def test_the_embedded_model_goes_by_its_name(
        self, peer: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("models.loading.EMBEDDED", {"emoji": peer.folder})
        model = models.load("emoji")
        assert model.source == "emoji"

    @pytest.mark.parametrize(
        "source", ["no such thing", "no/such/folder", "./a/b", "missing.safetensors", "emojis"]
    )
    def test_nothing_of_that_name(self, source: str) -> None:
        with pytest.raises(ModelError, match=r"there is no (file|folder)"):
            models.load(source)

    def test_no_network_and_no_cache(self, tmp_path: Path) -> None:
        """In a process of its own: the hub's client reads its environment when it is imported."""
        code = (
            "import models\ntry: models.load('someone/some-model')\nexcept models.ModelError as e: print(e)"
        )
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert "someone/some-model is neither a folder here nor in the download cache" in run.stdout

    def test_a_hub_id(self, peer: Pipeline, ours: LatentModel, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []

        def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
            assert repository == "someone/tiny"
            asked.append(allow_patterns)
            return str(peer.folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert_equal(models.load("someone/tiny", dtype=torch.float64), ours)
        assert len(asked) == 1
        assert "unet/diffusion_pytorch_model.safetensors" in asked[0]
        assert not any(pattern.endswith(".bin") for pattern in asked[0])

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_of_a_repository_what_is_read_is_asked_for(
        self, peer: Pipeline, monkeypatch: pytest.MonkeyPatch, variant: str | None
    ) -> None:
        """Through the filter of the hub's client, whose shards have had their variant in two places."""
        settings = [
            "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
            "unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        ]  # fmt: skip
        weights = {
            None: [
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors", "text_encoder/pytorch_model.safetensors",
            ],
            "fp16": [
                "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
                "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
            ],
        }  # fmt: skip
        others = [
            "README.md", "v1-5-pruned.safetensors", "safety_checker/model.safetensors", "text_encoder/model.bin",
            "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors",
        ]  # fmt: skip
        asked: list[list[str]] = []

        def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
            asked.append(allow_patterns)
            return str(peer.folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        hub.download("someone/tiny", variant)
        there = [*settings, *weights[variant], *weights["fp16" if variant is None else None], *others]
        assert list(filter_repo_objects(there, allow_patterns=asked[0])) == [*settings, *weights[variant]]

    def test_a_repository_is_cached_once_all_its_settings_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the layout of the hub's client, which also notes that a file does not exist."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository = tmp_path / "models--someone--tiny"
        snapshot, missing = repository / "snapshots" / "1a", repository / ".no_exist" / "1a"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("1a")
        for folder, part in ((snapshot, "unet"), (snapshot, "vae"), (missing, "text_encoder")):
            (folder / part).mkdir(parents=True)
            (folder / part / "config.json").touch()
        assert hub.cached("someone/tiny") is None
        (missing / "text_encoder").rename(snapshot / "text_encoder")
        assert hub.cached("someone/tiny") == snapshot

    def test_an_id_that_no_repository_can_have(self) -> None:
        with pytest.raises(ModelError, match="someone/some--model cannot be fetched from the hub"):
            models.load("someone/some--model")
        with pytest.raises(ModelError, match="someone/some--model"):
            models.outline("someone/some--model")

    def test_a_hub_id_without_safetensors(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []
        for file in list(copy.rglob("*.safetensors")):
            file.unlink()

        def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
            asked.append(allow_patterns)
            return str(copy)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(ModelError, match="holds none of"):
            models.load("someone/tiny", variant="fp16")
        assert "text_encoder/pytorch_model.fp16.bin" in asked[1]

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            ("RepositoryNotFoundError", "has no repository"),
            ("GatedRepoError", "licence"),
            ("OSError", "cannot be fetched"),
        ],
    )
    def test_what_the_hub_answers(self, monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
        from huggingface_hub import errors

        kind = OSError if error == "OSError" else getattr(errors, error)

        def snapshot_download(*_: object, **__: object) -> str:
            raise kind.__new__(kind) if error != "OSError" else OSError("disk full")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(ModelError, match=said):
            models.load("someone/some-model")


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "squaredcos_cap_v2", "steps": 1000, "zero_terminal_snr": False},
        {"name": "linear", "steps": 250, "beta_start": 4e-4, "beta_end": 0.08, "zero_terminal_snr": False},
        {"name": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": True},
    ],
)
def test_every_schedule_comes_back(tmp_path: Path, schedule: dict) -> None:
    model = presets.untrained(presets.TINY)
    model.schedule = schedule
    models.save(model, tmp_path / "model")
    assert models.load(tmp_path / "model").schedule == schedule


def test_a_schedule_without_betas_is_not_written(tmp_path: Path) -> None:
    model = presets.untrained(presets.TINY)
    model.schedule = {"name": "scaled_linear"}
    with pytest.raises(ModelError, match="does not say its betas"):
        models.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_saved_into(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = presets.untrained(presets.TINY)
    models.save(model, tmp_path / "model")
    assert_equal(models.load(tmp_path / "model"), model)


def test_saving_over_a_model_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    model = presets.untrained(presets.TINY)
    for name in ("model.old", "model.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    for _ in range(2):
        models.save(model, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old", "model.part"]
    assert (tmp_path / "model.old" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(("device", "said"), [("foo", "there is no device 'foo'"), ("cuda", "sees no GPU")])
def test_a_device_that_is_not_there(device: str, said: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match=said):
        models.load("emoji", device=device)
