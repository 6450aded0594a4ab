"""What a single file's tensors say about the networks that they belong to.

A single file carries no configuration, but nearly all of it can be read off names and shapes. Two things
cannot: the number of heads, which follows from the family (8 in the UNet of Stable Diffusion 1.x, 64 channels
each everywhere else), and whether the UNet predicts epsilon or v, which the caller has to know for 2.x.
"""

import re
from collections.abc import Iterable, Mapping

from models.errors import ModelError
from models.renaming import LAYOUTS
from models.text import ClipTextConfig
from models.unet import UNetConfig
from models.vae import VAEConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# As CompVis and Stability name the text transformer; a few merges without `text_model`, SD-Turbo as its trainer does.
TOWERS = ("single openclip", "single", "single flat", "single openclip sgm")
HEAD_WIDTH = 64
OPENCLIP_BLOCKS = 24


class Shapes:
    """The shapes of a file's tensors below a prefix; asking for one that is not there names it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, where: str) -> None:
        self.prefix, self.where = prefix, where
        self.shapes = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor of so many dimensions. Raises ModelError if there is none, or of another
        rank, or empty.
        """
        if not self.shapes:
            raise ModelError(
                f"{self.where} has no tensor under {self.prefix}...: a whole model is needed, with UNet, VAE and text "
                "encoder in one file or in a folder"
            )
        shape = self.shapes.get(name)
        if shape is None or len(shape) != dims:
            found = "is missing" if shape is None else f"has shape {shape}, not {dims} dimensions"
            raise ModelError(f"{self.where}: the tensor {self.prefix}{name} {found}")
        if 0 in shape:
            raise ModelError(f"{self.where}: the tensor {self.prefix}{name} is empty")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group takes among the names; 0 if none does."""
        return 1 + max((int(m[1]) for name in self.shapes if (m := re.match(pattern, name))), default=-1)


def unet_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> UNetConfig:
    """The UNet of a single file: 1.x if its context is 768 wide, 2.x if 1024. Raises ModelError for any other."""
    s = Shapes(shapes, UNET, where)
    channels, c_in, *_ = s.of("input_blocks.0.0.weight", 4)
    mult, attends, stages = [], [], [0]
    for i in range(1, s.count(r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in s:
            stages.append(0)
            continue
        if not stages[-1]:
            mult.append(s.of(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] // channels)
            if f"input_blocks.{i}.1.norm.weight" in s:
                attends.append(2 ** (len(mult) - 1))
        stages[-1] += 1
    context = s.of("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    if context not in (768, 1024):
        raise ModelError(f"{where}: a text of width {context} is neither Stable Diffusion 1.x (768) nor 2.x (1024)")
    return UNetConfig(
        in_channels=c_in,
        out_channels=s.of("out.2.weight", 4)[0],
        model_channels=channels,
        channel_mult=tuple(mult),
        num_res_blocks=stages[0],
        attention_resolutions=tuple(reversed(attends)),
        num_heads=8 if context == 768 else None,
        head_channels=None if context == 768 else HEAD_WIDTH,
        context_dim=context,
        transformer_depth=s.count(r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        linear_proj=len(s.shapes.get("middle_block.1.proj_in.weight", ())) == 2,
    )


def vae_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> VAEConfig:
    """The VAE of a single file, with Stable Diffusion's scale."""
    s = Shapes(shapes, VAE, where)
    channels, c_in, *_ = s.of("encoder.conv_in.weight", 4)
    levels = range(s.count(r"encoder\.down\.(\d+)\."))
    return VAEConfig(
        in_channels=c_in,
        latent_channels=s.of("decoder.conv_in.weight", 4)[1],
        channels=channels,
        channel_mult=tuple(s.of(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // channels for i in levels),
        num_res_blocks=s.count(r"encoder\.down\.0\.block\.(\d+)\."),
    )


def tower(names: Iterable[str]) -> str:
    """The layout of the text transformer in a single file, of `TOWERS`; CompVis's if there is none of them."""
    names = tuple(names)
    found = (t for t in TOWERS if any(name.startswith(LAYOUTS["text"][t].prefix) for name in names))
    return next(found, "single")


def text_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> ClipTextConfig:
    """The text transformer of a single file, CLIP (1.x) or OpenCLIP (2.x).

    Of OpenCLIP's blocks the last does not run. It is recognised by what is stored with it, the projection that follows
    the whole tower: files that were converted back from the diffusers layout have neither.
    """
    layout = tower(shapes)
    s = Shapes(shapes, LAYOUTS["text"][layout].prefix, where)
    if layout.startswith("single openclip"):
        vocab, width = s.of("token_embedding.weight", 2)
        blocks = s.count(r"transformer\.resblocks\.(\d+)\.")
        layers = blocks - (blocks == OPENCLIP_BLOCKS or "text_projection" in s)
        length, mlp_width = (
            s.of("positional_embedding", 2)[0],
            s.of("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        )
        return ClipTextConfig(vocab, length, width, layers, max(1, width // HEAD_WIDTH), mlp_width, "gelu")
    vocab, width = s.of("embeddings.token_embedding.weight", 2)
    length = s.of("embeddings.position_embedding.weight", 2)[0]
    mlp_width = s.of("encoder.layers.0.mlp.fc1.weight", 2)[0]
    layers = s.count(r"encoder\.layers\.(\d+)\.")
    return ClipTextConfig(vocab, length, width, layers, max(1, width // HEAD_WIDTH), mlp_width, "quick_gelu")
