"""A tiny Stable Diffusion made by the libraries whose files are read, and how two models are compared."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file

from models import LatentModel
from models.tokenizer import ClipTokenizer
from models.vocabulary import clip_vocabulary, from_merges

# Form of Stable Diffusion -> what its UNet and text encoder are told, everything tiny.
UNETS: dict[str, dict[str, Any]] = {
    "1.x": {"attention_head_dim": 4},
    "2.x": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
}
TEXTS: dict[str, dict[str, Any]] = {"1.x": {"hidden_act": "quick_gelu"}, "2.x": {"hidden_act": "gelu"}}


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
