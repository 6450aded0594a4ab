"""Loading, and agreement with the libraries whose files are read.

The peers compute in float64 too. What is left is the order of summation, about 1e-15 a sum and grown by
depth: 1e-10 of the largest value is far above that and far below any mistake.
"""

import inspect
import json
import shutil
import subprocess
import sys
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
from models.files import Weights
from models.outline import PUBLISHED
from models.presets import PRESETS
from models.tokenizer import ClipTokenizer
from tests.models.pipeline import Pipeline, assert_equal, assert_same_tensors

AGREEMENT = 1e-10
ROOT = Path(__file__).parents[2]

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
    "text_encoder": {"layer_norm_eps", "use_attention_mask"}, "scheduler": {"trained_betas"},
}  # fmt: skip


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


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
            ("scheduler", "beta_start", None), ("scheduler", "beta_end", "small"),
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

    def test_a_folder_of_models_is_none_and_one_in_it_is_named(self, copy: Path, tmp_path: Path) -> None:
        """A run's folder, and a folder of many files."""
        above = tmp_path / "runs"
        (above / "z" / "samples").mkdir(parents=True)
        shutil.move(copy, above / "z" / "model")
        (above / "z" / "a.safetensors").touch()
        with pytest.raises(ModelError, match=r"holds 2 that may be: name one of them, as .*runs/z/model$"):
            models.load(above / "z")
        (above / "b.ckpt").touch()
        (above / "a.txt").touch()
        for each in (models.load, models.outline):
            with pytest.raises(ModelError, match=r"runs is no model, and holds 1 that may be: .* as .*runs/b\.ckpt$"):
                each(above)

    def test_one_network_s_folder_is_no_model_and_that_around_it_is_named(self, copy: Path) -> None:
        for part in ("unet", "vae", "text_encoder"):
            with pytest.raises(ModelError, match=f"/{part} is one network of a model: name the folder .* {copy}$"):
                models.load(copy / part)

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
            ("vae", {"block_out_channels": {}}, "vae.* value of a wrong kind"),
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


@pytest.mark.parametrize("repository", PUBLISHED)
def test_a_published_id_is_outlined_as_its_card_says(repository: str) -> None:
    """1.x: 512 pixels, epsilon. 2.x: 768 pixels, v; what is called base 512 pixels, epsilon."""
    preset, second = PRESETS[PUBLISHED[repository]], "stable-diffusion-2" in repository
    says = (768, "v_prediction") if second and not repository.endswith("-base") else (512, "epsilon")
    assert (preset.family, preset.resolution, preset.prediction) == ("sd2" if second else "sd1", *says)


class TestNames:
    def test_the_embedded_model_goes_by_its_name(
        self, peer: Pipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("models.loading.EMBEDDED", {"emoji": peer.folder})
        model = models.load("emoji")
        assert model.source == "emoji"

    @pytest.mark.parametrize(
        "source",
        ["no such thing", "no/such/folder", "./a/b", "./a", "../a", "missing.safetensors", "a/missing.ckpt", "emojis"],
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

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_what_a_hub_id_is_asked_for_with(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch, prediction: str
    ) -> None:
        for file in list(copy.rglob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: str(copy))
        assert models.load("someone/tiny", prediction=prediction, variant="fp16").prediction == prediction

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
        with pytest.raises(ModelError, match="holds none of .*; the download of someone/tiny is not whole: connect"):
            models.load("someone/tiny", variant="fp16")
        assert "text_encoder/pytorch_model.fp16.bin" in asked[1]

    def test_what_has_come_of_an_interrupted_download(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a network the hub's client gives what there is, and does not say that it is not all."""
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, allow_patterns: str(copy))
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".fp16.safetensors"))
        with pytest.raises(ModelError, match="it does hold variant='fp16'$"):               # it is whole
            models.load("someone/tiny")
        (copy / "text_encoder_2").mkdir()
        with pytest.raises(ModelError, match="has a text_encoder_2: it is not a Stable Diffusion 1.x or 2.x model$"):
            models.load("someone/tiny")
        (copy / "text_encoder_2").rmdir()
        weights.with_suffix(".fp16.safetensors").unlink()
        weights.symlink_to(copy / "a blob that never came")
        not_whole = "the download of someone/tiny is not whole: connect to the network and load it again$"
        with pytest.raises(ModelError, match=f"holds none of .*; {not_whole}"):
            models.load("someone/tiny")
        shutil.rmtree(copy / "unet")
        with pytest.raises(ModelError, match=f"there is no .*unet/config.json.*; {not_whole}"):
            models.load("someone/tiny")
        (copy / "transformer").mkdir()                                      # of Stable Diffusion 3, which has no UNet
        (copy / "model_index.json").write_text('{"transformer": [], "vae": [], "text_encoder": []}')
        with pytest.raises(ModelError, match="has a transformer: it is not a Stable Diffusion 1.x or 2.x model$"):
            models.load("someone/tiny")

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
    ("device", "said"),
    [("foo", "there is no device 'foo'"), ("cuda", "sees no GPU"), ("meta", "on cpu and on cuda, not on meta")],
)
def test_a_device_that_is_not_there(device: str, said: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match=said):
        models.load("emoji", device=device)
