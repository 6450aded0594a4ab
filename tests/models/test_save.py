"""Saving in both layouts: what was read is written equal, and nothing that lies there is lost."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from diffusion import Schedule, default_levels
from models import LatentModel, ModelError, configs, presets
from models.files import metadata
from models.text import ClipText
from models.tokenizer import ClipTokenizer
from models.unet import UNet
from models.vae import VAE
from models.vocabulary import from_merges
from models.weights import on_meta
from tests.models.pipeline import Pipeline, assert_equal, assert_same_tensors, disturb
from tests.tiny import tiny_classes, tiny_glide, tiny_model


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
        assert (pipe.unet.config.sample_size, pipe.vae.config.sample_size) == (8, 16)
        assert pipe.scheduler.config.prediction_type == ("epsilon" if peer.form == "1.x" else "v_prediction")
        said = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}         # as published files do
        alone = diffusers.DDIMScheduler.from_pretrained(tmp_path / "again" / "scheduler")   # a pipeline corrects it
        assert {key: alone.config[key] for key in said} == said
        text, tokens = pipe.text_encoder.config, peer.tokenizer
        assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (tokens.begin, tokens.end, tokens.pad)
        assert pipe.tokenizer("a dog", padding="max_length")["input_ids"] == (
            peer.tokenizer.encode(["a dog"]).ids[0].tolist()
        )

    def test_diffusers_begins_in_pure_noise_where_the_schedule_ends_there(self, tmp_path: Path) -> None:
        model = tiny_model()
        model.schedule, model.prediction = model.schedule | {"zero_terminal_snr": True}, "v_prediction"
        models.save(model, tmp_path, "diffusers")
        theirs, schedule = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler"), Schedule(**model.schedule)
        theirs.set_timesteps(5)
        *levels, last = default_levels(schedule, "ddim", 5)
        assert theirs.timesteps.tolist() == [level.t for level in levels]
        assert levels[0].alpha_bar == 0
        assert last.alpha_bar == theirs.final_alpha_cumprod

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

    def test_the_side_of_the_images_comes_back(self, model: LatentModel, file: Path, tmp_path: Path) -> None:
        usual = 512 if model.family == "sd1" else 768
        models.save(replace(models.load(file), resolution=640), tmp_path / "fine_tuned.safetensors", "single")
        assert models.load(tmp_path / "fine_tuned.safetensors").resolution == 640
        spec = {key: value for key, value in metadata(file).items() if key != "modelspec.resolution"}
        for said in (None, "", "640", "640x512", "0x0", "x", "641x641", "-640x-640", "640x640x640"):
            more = {} if said is None else {"modelspec.resolution": said}
            save_file(load_file(file), tmp_path / "other.safetensors", spec | more)
            assert models.load(tmp_path / "other.safetensors").resolution == usual, said

    def test_another_padding_is_not_lost_in_silence(self, file: Path, tmp_path: Path) -> None:
        model = models.load(file)
        model.tokenizer = ClipTokenizer.clip(model.tokenizer.length, pad=5)
        with pytest.raises(ModelError, match="a single file cannot hold the padding of"):
            models.save(model, tmp_path / "again.safetensors", "single")

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
        models.save(replace(found, prediction="epsilon"), tmp_path / "eps.safetensors", "single")
        assert load_file(file).keys() | {"ztsnr"} == load_file(tmp_path / "eps.safetensors").keys()    # v_pred is gone
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
            ("double_blocks.0.img_attn.qkv.weight", "Flux"), ("x", "a file of no kind"),
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


def test_every_size_comes_back() -> None:
    """None of them is what a config means that does not say it."""
    unet = replace(presets.TINY.unet, in_channels=9, out_channels=5, transformer_depth=2, norm_groups=8)
    vae = replace(presets.TINY.vae, in_channels=1, latent_channels=5, norm_groups=16, scale=0.25)
    assert configs.read_unet(json.loads(json.dumps(configs.write_unet(unet, 8))), "unet") == unet
    assert configs.read_vae(json.loads(json.dumps(configs.write_vae(vae, 16))), "vae") == vae


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"scale_shift": True}, "scale_shift=True"),
        ({"resblock_updown": True}, "resblock_updown=True"),
        ({"attention": "self", "context_dim": 0}, "attention='self'"),
        ({"num_classes": 3}, "num_classes=3"),
    ],
)
def test_what_diffusers_unet_has_not_is_not_saved_as_if_it_had(tmp_path: Path, other: dict, said: str) -> None:
    model = presets.untrained(presets.TINY)
    model.unet = UNet(replace(presets.TINY.unet, **other))
    with pytest.raises(ModelError, match=f"a diffusers folder cannot hold a UNet of .*{said}"):
        models.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_heads_of_equal_width_are_written_as_their_numbers(tmp_path: Path) -> None:
    """And attention at resolutions in any order: other words for the same network."""
    model = presets.untrained(presets.TINY)
    resolutions = tuple(reversed(model.unet.config.attention_resolutions))
    model.unet = UNet(replace(model.unet.config, num_heads=None, head_channels=8, attention_resolutions=resolutions))
    models.save(model, tmp_path / "model")
    again = models.load(tmp_path / "model").unet
    ours, theirs = model.unet.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [again.config.heads(c) for c in again.config.channels] == [c // 8 for c in again.config.channels]


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


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_folder_is_not_called_as_files_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is called as files are, and .* a folder: give layout='single'"):
        models.save(tiny_model(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_home_may_be_written_as_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    models.save(tiny_model(), "~/model")
    models.save(tiny_glide(), "~/base.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "model"]
    assert torch.equal(models.load("~/model").unet.out[2].bias, tiny_model().unet.out[2].bias)
    assert models.outline("~/base.safetensors").resolution == 16


def test_saving_over_a_model_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    model = presets.untrained(presets.TINY)
    for name in ("model.old", "model.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    for _ in range(2):
        models.save(model, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old", "model.part"]
    assert (tmp_path / "model.old" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("make", [tiny_model, tiny_glide, tiny_classes])
def test_layers_of_ones_own_are_not_saved_as_if_they_could_be_loaded(
    tmp_path: Path, make: Callable[[], models.loading.Model]
) -> None:
    """A file was written that was refused when it was read, perhaps in the place of a good one."""
    model, path = make(), tmp_path / ("model" if make is tiny_model else "model.safetensors")
    models.save(model, path)
    layer = model.unet.time_embed[0]
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ModelError, match="the unet of tiny.* is not as its configuration tells, by time_embed.0.param"):
        models.save(model, path)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model.unet.time_embed.adapter = nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"by time_embed.adapter.bias \(3,\) for example"):
        models.save(model, path)
    del model.unet.time_embed.adapter, model.unet.time_embed[2].bias
    with pytest.raises(ModelError, match=r"by time_embed.2.bias \(128,\) for example"):
        models.save(model, path)
    assert list(models.load(path).unet.state_dict()) == list(make().unet.state_dict())
