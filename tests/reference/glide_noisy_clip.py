"""The reference case `glide_noisy_clip_tiny`: both encoders' embeddings, and the gradient that guides an image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.noisy_clip import NoisyClip, NoisyClipConfig
from models.renaming import Layout
from models.weights import Part, assign, on_meta


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected)."""
    clip = on_meta(lambda: NoisyClip(clip_config(config["text"], config["image"])))
    state = {name.removeprefix("state."): t.float() for name, t in tensors.items() if name.startswith("state.")}
    assign([Part(clip, Layout())], state, "the case")
    ids, t, lengths = (tensors[f"in.{name}"] for name in ("tokens", "t", "lengths"))
    text = clip.text_encoder(ids, torch.arange(ids.shape[1]) < lengths[:, None]).detach()
    yield "out.text_embedding", text, tensors["out.text_embedding"]
    image = tensors["in.image"].clone().requires_grad_()
    yield "out.image_embedding", clip.image_encoder(image, t).detach(), tensors["out.image_embedding"]
    (grad,) = torch.autograd.grad(config["grad_scale"] * clip.similarity(text, image, t).sum(), image)
    yield "out.cond_grad", grad, tensors["out.cond_grad"]


def clip_config(text: dict, image: dict) -> NoisyClipConfig:
    """The case's encoders."""
    return NoisyClipConfig(
        text["n_embd"], text["n_bpe_vocab"], text["max_text_len"], text["n_head"], text["n_xf_blocks"],
        image["image_size"], image["patch_size"], image["n_head"], image["n_xf_blocks"], image["n_timestep"],
        image["n_head_state"],
    )  # fmt: skip
