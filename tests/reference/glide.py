"""The reference cases `glide_*`: GLIDE's base, upsampler and inpainting networks with their text transformer.

`token_embedding_grad` is the gradient of the summed squares of the first three output channels with respect to the
table; here it is taken as training takes it, with every row of the table as an extra vector.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.glide_text import GlideText, GlideTextConfig
from models.pixels import beside
from models.renaming import Layout
from models.unet import UNet, UNetConfig
from models.weights import Part, assign, on_meta

MORE_CHANNELS = {"Text2ImUNet": 0, "SuperResText2ImUNet": 3, "InpaintText2ImUNet": 4, "SuperResInpaintText2ImUnet": 7}
FIXED = {"xf_final_ln": True, "xf_padding": True, "use_scale_shift_norm": True, "resblock_updown": True}


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected) for the text's features, the network's output and the tokens' gradient."""
    for key, value in (config["unet"] | config["text"]).items():
        if FIXED.get(key, value) != value:
            raise ValueError(f"{key} = {value} is not a network that this project has")
    unet, text = on_meta(lambda: UNet(unet_config(config))), on_meta(lambda: GlideText(text_config(config)))
    state = {name.removeprefix("state."): t.float() for name, t in tensors.items() if name.startswith("state.")}
    assign([Part(unet, Layout()), Part(text, Layout())], state, "the case")

    x, t, ids, mask = (tensors[f"in.{name}"] for name in ("x", "t", "tokens", "mask"))
    table = text.token_embedding.weight.detach().clone().requires_grad_()
    features = text(ids + config["n_vocab"], mask.bool(), extra=table)
    yield "out.text_tokens_NLC", features.context.detach(), tensors["out.text_tokens_NLC"]
    yield "out.text_pooled", features.pooled.detach(), tensors["out.text_pooled"]
    more = beside(x.shape[2:], *(tensors.get(f"in.{name}") for name in ("low_res", "inpaint_image", "inpaint_mask")))
    out = unet(torch.cat([x, *more], dim=1), t, features.context, features.pooled)
    yield "out.model_output", out.detach(), tensors["out.model_output"]
    (grad,) = torch.autograd.grad(out[:, :3].square().sum(), table)
    yield "out.token_embedding_grad", grad, tensors["out.token_embedding_grad"]


def unet_config(case: dict) -> UNetConfig:
    """The case's UNet; attention_resolutions are downsampling factors, as here."""
    c = case["unet"]
    return UNetConfig(
        in_channels=c["in_channels"] + MORE_CHANNELS[case["cls"]],
        out_channels=c["out_channels"],
        model_channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention_resolutions=tuple(c["attention_resolutions"]),
        num_heads=None,
        head_channels=c["num_head_channels"],
        context_dim=case["text"]["xf_width"],
        attention="joint",
        resblock_updown=True,
        scale_shift=True,
    )


def text_config(case: dict) -> GlideTextConfig:
    """The case's text transformer."""
    c = case["text"]
    return GlideTextConfig(
        case["n_vocab"], c["text_ctx"], c["xf_width"], c["xf_layers"], c["xf_heads"],
        4 * case["unet"]["model_channels"],
    )  # fmt: skip
