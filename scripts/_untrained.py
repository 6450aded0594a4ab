"""Untrained models for train_diffusion.py: a latent one around an autoencoder, a GLIDE, or one of classes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from models import ClassModel, ClipTokenizer, GlideModel, LatentModel
from models.class_names import ClassNames
from models.errors import OF_WRONG_KINDS, ModelError
from models.files import Weights, read_json
from models.glide_text import GlideText, GlideTextConfig
from models.glide_tokenizer import GlideTokenizer
from models.presets import COSINE, GLIDE_BASE, GLIDE_UPSAMPLE, LINEAR, SD_SCHEDULE, family_of
from models.renaming import Layout
from models.text import ClipText, ClipTextConfig
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights import Part, fill, on_meta


def load_vae(folder: Path) -> VAE:
    """The autoencoder that train_vae.py left in its output folder."""
    file = folder / "config.json"
    described = read_json(file)
    try:
        config = VAEConfig(**described | {"channel_mult": tuple(described["channel_mult"])})
        vae = on_meta(lambda: VAE(config))
    except OF_WRONG_KINDS as error:
        raise ModelError(f"{file} does not describe an autoencoder of train_vae.py ({error})") from error
    fill([Part(vae, Layout())], Weights((folder / "vae.safetensors",)), torch.float32, torch.device("cpu"))
    return vae


def latent_model(config: Any, captions: Iterable[str], size: int) -> LatentModel:
    """Stable Diffusion in small, around a trained autoencoder; it predicts v. config: that of train_diffusion.py."""
    tokenizer = ClipTokenizer.train(captions, config.vocab_size, config.context_length)
    vae = load_vae(config.vae)
    torch.manual_seed(config.seed)
    latent = vae.config.latent_channels
    unet = UNet(
        UNetConfig(
            latent, latent, config.model_channels, config.channel_mult, config.num_res_blocks,
            config.attention_resolutions, None, config.head_channels, config.text_width, norm_groups=config.norm_groups,
        )
    )  # fmt: skip
    text = ClipText(
        ClipTextConfig(
            tokenizer.vocab_size, config.context_length, config.text_width, config.text_layers, config.text_heads,
            4 * config.text_width,
        )
    )  # fmt: skip
    torch.nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)     # as CLIP does; the default is 1
    torch.nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    return LatentModel(
        family=family_of(text.config), unet=unet, vae=vae, text=text, tokenizer=tokenizer, schedule=dict(SD_SCHEDULE),
        prediction="v_prediction", resolution=size, source=str(config.output),
    )  # fmt: skip


def glide_model(config: Any, captions: Iterable[str], size: int) -> GlideModel:
    """GLIDE in small, base or upsampler; it predicts eps, an upsampler v, and the variance.

    An upsampler knows x_0 roughly at any noise, since it is shown it; of eps it would have to know each thousandth
    there, and after a short training what was wrong drew a coarse grain. config: that of train_diffusion.py.
    """
    tokenizer = GlideTokenizer.train(captions, config.vocab_size, config.context_length)
    torch.manual_seed(config.seed)
    unet = UNet(
        UNetConfig(
            3 + 3 * (config.factor > 1), 6, config.model_channels, config.channel_mult, config.num_res_blocks,
            config.attention_resolutions, None, config.head_channels, config.text_width,
            attention="joint", resblock_updown=True, scale_shift=True, norm_groups=config.norm_groups,
        )
    )  # fmt: skip
    text = GlideText(
        GlideTextConfig(
            tokenizer.vocab_size, config.context_length, config.text_width, config.text_layers, config.text_heads,
            4 * config.model_channels,
        )
    )  # fmt: skip
    torch.nn.init.normal_(text.token_embedding.weight, std=0.02)
    like, form = (GLIDE_BASE, "epsilon") if config.factor == 1 else (GLIDE_UPSAMPLE, "v_prediction")
    return GlideModel(unet, text, tokenizer, dict(like.schedule), size, config.factor, False, str(config.output), form)


def class_model(config: Any, captions: Iterable[str], size: int) -> ClassModel:
    """guided-diffusion in small, of the classes that the captions are, or of none; it predicts eps alone.

    config: that of train_diffusion.py.
    """
    classes = ClassNames(tuple(dict.fromkeys(caption for caption in captions if caption)))
    torch.manual_seed(config.seed)
    unet = UNet(
        UNetConfig(
            3 + 3 * (config.factor > 1), 3, config.model_channels, config.channel_mult, config.num_res_blocks,
            config.attention_resolutions, None, config.head_channels, 0, attention="self", resblock_updown=True,
            scale_shift=True, num_classes=len(classes) or None, norm_groups=config.norm_groups,
        )
    )  # fmt: skip
    schedule = dict(COSINE if config.factor == 1 else LINEAR)
    null = config.caption_dropout > 0 or not len(classes)
    return ClassModel(unet, classes, schedule, size, str(config.output), null, config.factor)
