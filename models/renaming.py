"""The names under which others keep the tensors of these networks.

The networks carry the published CompVis names, so single files need a prefix and nothing else. Every other
layout is a rule from our name to theirs; applied to all names of a network it gives the list of tensors to
expect in a file, with their shapes, and the same list is read backwards for loading and forwards for saving.
No rule has an inverse to keep in step.

Only two layouts store another shape: OpenCLIP stacks query, key and value into one `in_proj`, and the
diffusers VAE keeps the 1x1 convolutions of its attention as matrices.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

Rule = Callable[[str, nn.Module], str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a file names the tensors of one network.

    rule: our name and the network -> their name, without `prefix`. matrices: the 1x1 convolutions of the VAE's
    attention are stored as matrices. unused: pattern of further names, prefix included, that belong to the layout and
    that no network here needs; where it has a group `block`, only the block after the last that runs.
    """

    prefix: str = ""
    rule: Rule = lambda name, network: name
    matrices: bool = False
    unused: str = r"(?!)"

    def leaves(self, name: str, network: nn.Module) -> bool:
        """Whether a name in a file is published but not used by this network."""
        found = re.fullmatch(self.unused, name)
        block = found and found.groupdict().get("block")
        return bool(found) and (block is None or int(block) == network.config.layers)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its name and shape there, and the parameters of ours that it holds, stacked in order."""

    name: str
    shape: Shape
    parts: tuple[str, ...]
    shapes: tuple[Shape, ...]

    def accepts(self, shape: Shape) -> bool:
        """Whether a tensor of this shape is that tensor. A 1x1 convolution and a matrix are told apart only where the
        network tells them apart: the attention of the VAE is found as either."""
        return shape == self.shape or (self.either and _bare(shape) == _bare(self.shape))

    @property
    def either(self) -> bool:
        """Whether files are found with this tensor as a matrix and as a 1x1 convolution."""
        return bool(re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", self.parts[0]))

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor of a file as our parameters, by our names."""
        pieces = tensor.split([shape[0] for shape in self.shapes]) if len(self.parts) > 1 else (tensor,)
        return {part: piece.reshape(shape) for part, piece, shape in zip(self.parts, pieces, self.shapes)}

    def join(self, parameters: dict[str, Tensor]) -> Tensor:
        """Our parameters as the tensor of a file."""
        pieces = [parameters[part] for part in self.parts]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(self.shape)


def stored(network: nn.Module, layout: Layout) -> list[Stored]:
    """Every tensor that a file of this layout holds for a network, which may be on the meta device."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(layout.prefix + layout.rule(name, network), []).append(name)
    return [_stored(theirs, ours, shapes, layout.matrices) for theirs, ours in parts.items()]


def _stored(theirs: str, ours: list[str], shapes: dict[str, Shape], matrices: bool) -> Stored:
    if len(ours) > 1:
        ours = sorted(ours, key=lambda name: "qkv".index(name.split(".")[-2][0]))
    each = tuple(shapes[name] for name in ours)
    shape = (sum(s[0] for s in each), *each[0][1:])
    entry = Stored(theirs, shape, tuple(ours), each)
    return Stored(theirs, shape[:2], entry.parts, each) if matrices and entry.either else entry


def _bare(shape: Shape) -> Shape:
    return shape[:2] if prod(shape[2:]) == 1 else shape


def substitution(*pairs: tuple[str, str]) -> Rule:
    """A rule that applies regular expressions one after another."""

    def rule(name: str, network: nn.Module) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return rule


# --- UNet -----------------------------------------------------------------------------------------

RESIDUAL = substitution(
    (r"^in_layers\.0", "norm1"),
    (r"^in_layers\.2", "conv1"),
    (r"^emb_layers\.1", "time_emb_proj"),
    (r"^out_layers\.0", "norm2"),
    (r"^out_layers\.3", "conv2"),
    (r"^skip_connection", "conv_shortcut"),
)
ENDS = substitution(
    (r"^input_blocks\.0\.0", "conv_in"),
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^out\.0", "conv_norm_out"),
    (r"^out\.2", "conv_out"),
)


def diffusers_unet(name: str, network: nn.Module) -> str:
    """diffusers counts residual blocks and attentions apart, level by level, where CompVis counts stages.

    Going down, a level is num_res_blocks stages and a halving; going up, it has one stage more, whose end doubles.
    """
    blocks = network.config.num_res_blocks
    match name.split(".", 3):
        case ["input_blocks", stage, part, rest] if stage != "0":
            level, i = divmod(int(stage) - 1, blocks + 1)
            if rest.startswith("op."):
                return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
            return f"down_blocks.{level}.{_block(part)}.{i}.{RESIDUAL(rest, network)}"
        case ["output_blocks", stage, part, rest]:
            level, i = divmod(int(stage), blocks + 1)
            if rest.startswith("conv."):
                return f"up_blocks.{level}.upsamplers.0.{rest}"
            return f"up_blocks.{level}.{_block(part)}.{i}.{RESIDUAL(rest, network)}"
        case ["middle_block", part, *rest]:
            return f"mid_block.{_block(part)}.{int(part) // 2}.{RESIDUAL('.'.join(rest), network)}"
    return ENDS(name, network)


def _block(part: str) -> str:
    return "attentions" if part == "1" else "resnets"


# --- VAE ------------------------------------------------------------------------------------------


def diffusers_vae(query: str, key: str, value: str, out: str) -> Rule:
    """diffusers' names for the VAE; those of its attention changed once, and both are found in files."""
    common = substitution(
        (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
        (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
        (r"mid\.block_1\.", "mid_block.resnets.0."),
        (r"mid\.block_2\.", "mid_block.resnets.1."),
        (r"mid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
        (r"mid\.attn_1\.q\.", f"mid_block.attentions.0.{query}."),
        (r"mid\.attn_1\.k\.", f"mid_block.attentions.0.{key}."),
        (r"mid\.attn_1\.v\.", f"mid_block.attentions.0.{value}."),
        (r"mid\.attn_1\.proj_out\.", f"mid_block.attentions.0.{out}."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )

    def rule(name: str, network: nn.Module) -> str:
        top = len(network.config.channel_mult) - 1  # diffusers counts decoder levels upwards
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", name)
        return common(name, network)

    return rule


# --- text -----------------------------------------------------------------------------------------

OPENCLIP = substitution(
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.self_attn\.[qkv]_proj\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)

# --- what is found in files -----------------------------------------------------------------------

BUFFERS = (
    r"(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights|sqrt_recip(m1)?_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|model_ema\..+|v_pred|ztsnr"
)
POSITIONS = r"(.*\.)?embeddings\.position_ids"
# ComfyUI saves what its class for CLIP has besides.
CLIP_HEAD = r"cond_stage_model\.(logit_scale|text_projection|transformer\.text_projection\.weight)"


def _openclip(prefix: str) -> Layout:
    spare = rf"logit_scale|text_projection|attn_mask|transformer\.resblocks\.(?P<block>\d+)\..+|{POSITIONS}"
    return Layout(prefix, OPENCLIP, unused=rf"{re.escape(prefix)}({spare})")


LAYOUTS: dict[str, dict[str, Layout]] = {
    "unet": {
        "single": Layout("model.diffusion_model.", unused=BUFFERS),
        "diffusers": Layout(rule=diffusers_unet),
    },
    "vae": {
        "single": Layout("first_stage_model."),
        "diffusers": Layout(rule=diffusers_vae("to_q", "to_k", "to_v", "to_out.0"), matrices=True),
        "diffusers published": Layout(rule=diffusers_vae("query", "key", "value", "proj_attn"), matrices=True),
    },
    "text": {
        "single": Layout("cond_stage_model.transformer.text_model.", unused=f"{POSITIONS}|{CLIP_HEAD}"),
        "single flat": Layout("cond_stage_model.transformer.", unused=f"{POSITIONS}|{CLIP_HEAD}"),
        "single openclip": _openclip("cond_stage_model.model."),
        "single openclip sgm": _openclip("conditioner.embedders.0.model."),
        "diffusers": Layout("text_model.", unused=POSITIONS),
        "diffusers flat": Layout(unused=POSITIONS),
    },
}
