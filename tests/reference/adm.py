"""The reference cases `adm_*`: guided-diffusion's UNets, with classes and without, and its classifier of noisy images.

`log_prob_grad` is the gradient of the summed log-probabilities of the given classes with respect to the noisy images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.classifier import Classifier, ClassifierConfig
from models.renaming import Layout
from models.unet import UNet, UNetConfig
from models.weights import Part, assign, on_meta


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected)."""
    if config["cls"] == "EncoderUNetModel":
        yield from check_classifier(config, tensors)
    elif config["cls"] == "UNetModel":
        yield from check_unet(config, tensors)
    else:
        raise ValueError(f"{config['cls']} is not a network that this project has")


def check_unet(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The raw prediction."""
    network = filled(on_meta(lambda: UNet(unet_config(config["unet"]))), tensors)
    classes = tensors.get("in.y")
    pooled = None if classes is None else network.label_emb(classes)
    out = network(tensors["in.x"], tensors["in.t"], None, pooled).detach()
    yield "out.model_output", out, tensors["out.model_output"]


def check_classifier(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Logits, and the gradient that guides."""
    case = config["classifier"]
    if case.get("pool") != "attention":
        raise ValueError(f"pool = {case.get('pool')} is not one that this project has")
    described = ClassifierConfig(unet_config(case | {"use_new_attention_order": False}), case["image_size"])
    network = filled(on_meta(lambda: Classifier(described)), tensors)
    x = tensors["in.x"].clone().requires_grad_()
    logits = network(x, tensors["in.t"])
    yield "out.logits", logits.detach(), tensors["out.logits"]
    chosen = logits.log_softmax(dim=1).gather(1, tensors["in.y"][:, None])
    (grad,) = torch.autograd.grad(chosen.sum(), x)
    yield "out.log_prob_grad", grad, tensors["out.log_prob_grad"]


def filled(network: torch.nn.Module, tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The network with the case's weights."""
    state = {name.removeprefix("state."): t.float() for name, t in tensors.items() if name.startswith("state.")}
    assign([Part(network, Layout())], state, "the case")
    return network


def unet_config(c: dict) -> UNetConfig:
    """The case's network; a num_head_channels of -1 means that num_heads counts."""
    by_channels = c.get("num_head_channels", -1) > 0
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=c["model_channels"],
        channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"],
        attention_resolutions=tuple(c["attention_resolutions"]),
        num_heads=None if by_channels else c["num_heads"],
        head_channels=c["num_head_channels"] if by_channels else None,
        attention="self" if c["use_new_attention_order"] else "self_legacy",
        resblock_updown=c["resblock_updown"],
        scale_shift=c["use_scale_shift_norm"],
        num_classes=c.get("num_classes"),
    )
