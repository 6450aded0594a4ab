"""Our configurations and the config.json files of the diffusers layout, translated both ways.

A config.json has far more settings than Stable Diffusion uses. Those that say something about the networks
here are translated; the others must have the one value that these networks are built for, or the file is
refused by name: a setting that is silently ignored is a wrong image that nobody can explain.

One name misleads: `attention_head_dim` of a diffusers UNet is the *number* of heads, one number or one a level.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from models.errors import ModelError
from models.text import ClipTextConfig
from models.unet import UNetConfig
from models.vae import VAEConfig

Json = Mapping[str, Any]

UNET_FIXED: Json = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
    "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "dual_cross_attention": False, "class_embed_type": None, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "addition_embed_type": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "mid_block_only_cross_attention": None, "cross_attention_norm": None,
    "reverse_transformer_layers_per_block": None,
}  # fmt: skip
VAE_FIXED: Json = {
    "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None,
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
TEXT_FIXED: Json = {"layer_norm_eps": 1e-5, "use_attention_mask": False}     # the latter hides the padding
TEXT_DEFAULTS: Json = {
    "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu",
}  # fmt: skip
BETA_SCHEDULES = ("linear", "scaled_linear")
SCHEDULE_FIXED: Json = {"trained_betas": None, "use_flow_sigmas": False}


def read_unet(file: Json, where: str) -> UNetConfig:
    """A UNet2DConditionModel's config.json. Raises ModelError for what the UNet here is not."""
    _refuse(file, UNET_FIXED, where)
    channels = _need(file, "block_out_channels", where)
    blocks = _need(file, "down_block_types", where)
    known = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if not set(blocks) <= set(known) or list(file.get("up_block_types", [])) != [known[b] for b in reversed(blocks)]:
        said = f"{list(blocks)} down and {list(file.get('up_block_types', []))} up"
        raise ModelError(f"{where}: only {', '.join(known)} and their mirror image are supported, found {said}")
    heads = file.get("num_attention_heads") or file.get("attention_head_dim", 8)
    num_heads, head_channels = _heads(heads, channels, where)
    return UNetConfig(
        in_channels=file.get("in_channels", 4),
        out_channels=file.get("out_channels", 4),
        model_channels=channels[0],
        channel_mult=_multiples(channels, where),
        num_res_blocks=_same(file.get("layers_per_block", 2), "layers_per_block", where),
        attention_resolutions=tuple(2**i for i in range(len(blocks))[::-1] if blocks[i].startswith("CrossAttn")),
        num_heads=num_heads,
        head_channels=head_channels,
        context_dim=_same(_need(file, "cross_attention_dim", where), "cross_attention_dim", where),
        transformer_depth=_same(file.get("transformer_layers_per_block", 1), "transformer_layers_per_block", where),
        linear_proj=bool(file.get("use_linear_projection", False)),
        norm_groups=file.get("norm_num_groups", 32),
    )


def read_sample_size(file: Json, where: str) -> int:
    """The side of the latents that a UNet was trained on; Stable Diffusion 1.x's where it is not said.

    Raises ModelError for latents that are not square.
    """
    return int(_same(file.get("sample_size") or 64, "sample_size", where))


def write_unet(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """The config.json of a UNet; sample_size: side of the latents that it was trained on.

    Raises ModelError for a UNet whose stem is not as wide as its first level: diffusers knows one number for both;
    and for one with parts that Stable Diffusion's has not.
    """
    if config.channel_mult[0] != 1:
        raise ModelError(
            f"diffusers has one number for the first convolution and the first level, but this UNet has "
            f"channel_mult {config.channel_mult}: it must begin with 1"
        )
    channels = list(config.channels)
    attends = [2**i in config.attention_resolutions for i in range(len(channels))]
    heads = config.num_heads or [config.heads(c) for c in channels]
    written = {
        "_class_name": "UNet2DConditionModel", "sample_size": sample_size,
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": config.num_res_blocks, "attention_head_dim": heads,
        "cross_attention_dim": config.context_dim, "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.linear_proj, "upcast_attention": config.linear_proj,
        "act_fn": "silu", "norm_eps": 1e-5, "norm_num_groups": config.norm_groups,
        "flip_sin_to_cos": True, "freq_shift": 0,
    }  # fmt: skip
    told, ours = asdict(read_unet(written, "a diffusers folder")), asdict(config)
    otherwise = "attention_resolutions", "num_heads", "head_channels"       # may be told in another way
    if lost := [f"{key}={ours[key]!r}" for key in ours if ours[key] != told[key] and key not in otherwise]:
        raise ModelError(f"a diffusers folder cannot hold a UNet of {', '.join(lost)}")
    return written


def read_vae(file: Json, where: str) -> VAEConfig:
    """An AutoencoderKL's config.json. Raises ModelError for what the VAE here is not."""
    _refuse(file, VAE_FIXED, where)
    channels = _need(file, "block_out_channels", where)
    return VAEConfig(
        in_channels=file.get("in_channels", 3),
        latent_channels=file.get("latent_channels", 4),
        channels=channels[0],
        channel_mult=_multiples(channels, where),
        num_res_blocks=file.get("layers_per_block", 1),
        scale=float(file.get("scaling_factor", 0.18215)),
        norm_groups=file.get("norm_num_groups", 32),
    )


def write_vae(config: VAEConfig, sample_size: int) -> dict[str, Any]:
    """The config.json of a VAE; sample_size: side of the images that it was trained on.

    Raises ModelError for one whose first convolution is not as wide as its first level, as `write_unet`.
    """
    levels = len(config.channel_mult)
    if config.channel_mult[0] != 1:
        raise ModelError(f"a diffusers VAE's channel_mult begins with 1; this one's is {config.channel_mult}")
    return {
        "_class_name": "AutoencoderKL", "sample_size": sample_size,
        "in_channels": config.in_channels, "out_channels": config.in_channels,
        "latent_channels": config.latent_channels, "layers_per_block": config.num_res_blocks,
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": config.scale, "act_fn": "silu", "norm_num_groups": config.norm_groups,
    }  # fmt: skip


def read_text(file: Json, where: str) -> ClipTextConfig:
    """A CLIPTextModel's config.json; what is absent has transformers' default. Raises ModelError as `read_unet`."""
    _refuse(file, TEXT_FIXED, where)
    file = TEXT_DEFAULTS | dict(file)
    if file["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ModelError(f"{where}: hidden_act {file['hidden_act']!r} is neither quick_gelu (CLIP) nor gelu (OpenCLIP)")
    return ClipTextConfig(
        vocab_size=file["vocab_size"],
        length=file["max_position_embeddings"],
        width=file["hidden_size"],
        layers=file["num_hidden_layers"],
        heads=file["num_attention_heads"],
        mlp_width=file["intermediate_size"],
        activation=file["hidden_act"],
    )


def write_text(config: ClipTextConfig, begin: int, end: int, pad: int) -> dict[str, Any]:
    """The config.json of a text transformer, with the tokenizer's special ids."""
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
        "vocab_size": config.vocab_size, "max_position_embeddings": config.length,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width, "hidden_act": config.activation, "layer_norm_eps": 1e-5,
        "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad,
    }  # fmt: skip


def read_schedule(file: Json, where: str) -> tuple[dict[str, Any], str]:
    """A scheduler_config.json: keyword arguments of diffusion.Schedule, and the prediction type.

    What it says of drawing (its class, timestep_spacing, steps_offset, set_alpha_to_one) is passed over: a sampler's
    times are those of `diffusion.default_levels`; who needs others, as for SD-Turbo, hands a sampler its levels.
    Raises ModelError as `read_unet`, and for a class of schedulers without betas: diffusers writes those of every one
    that has any.
    """
    _refuse(file, SCHEDULE_FIXED, where)
    if (made_by := file.get("_class_name")) and not any(key.startswith("beta_") for key in file):
        raise ModelError(
            f"{where} has no betas: it is of {made_by}, for flow matching or another process than the one here, whose "
            "model predicts epsilon or v"
        )
    schedule = {
        "name": file.get("beta_schedule", "linear"),
        "steps": file.get("num_train_timesteps", 1000),
        "zero_terminal_snr": file.get("rescale_betas_zero_snr", False),
    }
    require_schedule(schedule["name"], where)
    if schedule["name"] in BETA_SCHEDULES:  # the others have no use for the betas that diffusers writes all the same
        schedule |= {"beta_start": float(file.get("beta_start", 1e-4)), "beta_end": float(file.get("beta_end", 0.02))}
    return schedule, file.get("prediction_type", "epsilon")


def require_schedule(name: Any, where: str) -> None:
    """Raise ModelError unless a schedule of this name is known."""
    if name not in (*BETA_SCHEDULES, "squaredcos_cap_v2"):
        raise ModelError(f"{where}: no schedule {name!r} is known here")


def write_schedule(schedule: Json, prediction: str) -> dict[str, Any]:
    """The scheduler_config.json, for diffusers' DDIM as Stable Diffusion uses it; of one that ends in pure noise with
    the times that begin there (Lin et al. 2023, section 3.3), as `diffusion.default_levels` has them.

    Raises ModelError for a schedule that leaves its betas to a default: diffusers' defaults are others.
    """
    betas = {key: schedule[key] for key in ("beta_start", "beta_end") if schedule.get(key) is not None}
    if schedule["name"] in BETA_SCHEDULES and len(betas) < 2:
        raise ModelError(f"the schedule {dict(schedule)} does not say its betas: give beta_start and beta_end")
    zero = schedule.get("zero_terminal_snr", False)
    spacing = {"timestep_spacing": "trailing"} if zero else {"steps_offset": 1}
    return betas | spacing | {
        "_class_name": "DDIMScheduler", "beta_schedule": schedule["name"],
        "num_train_timesteps": schedule.get("steps", 1000), "prediction_type": prediction,
        "rescale_betas_zero_snr": zero, "set_alpha_to_one": zero, "clip_sample": False,
    }  # fmt: skip


def _refuse(file: Json, fixed: Json, where: str) -> None:
    for key, value in fixed.items():
        if file.get(key, value) != value:
            raise ModelError(f"{where}: {key} is {reprlib.repr(file[key])}; only {value!r} is supported")


def _need(file: Json, key: str, where: str) -> Any:
    if file.get(key) is None:
        raise ModelError(f"{where} does not say {key}")
    return file[key]


def _same(value: int | Sequence[int], key: str, where: str) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise ModelError(f"{where}: {key} is {value}; only one number for all of them is supported")
    return values.pop()


def _multiples(channels: Sequence[int], where: str) -> tuple[int, ...]:
    if any(c % channels[0] for c in channels):
        raise ModelError(f"{where}: block_out_channels {list(channels)} are not multiples of the first")
    return tuple(c // channels[0] for c in channels)


def _heads(heads: int | Sequence[int], channels: Sequence[int], where: str) -> tuple[int | None, int | None]:
    """(heads, None) where every level has as many, (None, channels a head) where every head is as wide."""
    each = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    if len(set(each)) == 1:
        return each[0], None
    widths = {c // h for c, h in zip(channels, each)}
    if len(each) != len(channels) or len(widths) != 1:
        raise ModelError(f"{where}: {each} heads over {list(channels)} channels are neither equal nor equally wide")
    return None, widths.pop()
