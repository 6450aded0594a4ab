"""GLIDE's noise-aware CLIP: how well a text describes a noisy image, at any time of the diffusion.

Two transformers, of a text and of an image in patches, end in one space; the first token of an image's sequence stands
for its time. As CLIP itself they were trained to put an image beside its own caption, but on noisy images, so that the
gradient of the similarity means something at every step of a chain.

Parameter names are those of `clip_text_enc.pt` and `clip_image_enc.pt`.
Source: Nichol et al. 2022 (GLIDE), sections 2.4 and 3.4; openai/glide-text2im @ 69b5307, clip/encoders.py.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attend import attend, by_head
from models.tokenizer import ClipTokenizer

PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)     # of 0..255, as CLIP has them
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)


@dataclass(frozen=True)
class NoisyClipConfig:
    """Both transformers in numbers; the published ones are the defaults. embedding: of the common space."""

    embedding: int = 512
    vocab_size: int = 65536
    length: int = 77
    text_heads: int = 8
    text_layers: int = 12
    image_size: int = 64
    patch: int = 4
    image_heads: int = 12
    image_layers: int = 12
    times: int = 1000
    head_channels: int = 64


class Norm(nn.Module):
    """A layer norm whose parameters are called g and b."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.g.shape, self.g, self.b, eps=1e-5)


class Affine(nn.Module):
    """A linear layer whose parameters are called w and b."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(c_out, c_in) * c_in**-0.5)
        self.b = nn.Parameter(torch.zeros(c_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class SelfAttention(nn.Module):
    """A residual branch; keys carry no bias."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln = Norm(width)
        self.f_q, self.f_k, self.f_v = Affine(width, width), Affine(width, width, bias=False), Affine(width, width)
        self.f_c = Affine(width, width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, N, D)
        y = self.ln(x)
        q, k, v = (by_head(project(y), self.heads) for project in (self.f_q, self.f_k, self.f_v))
        return x + self.f_c(attend(q, k, v, self.causal))


class MLP(nn.Module):
    """A residual branch: widen, bend, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f_1, self.f_2 = Affine(width, 4 * width), Affine(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, N, D)
        return x + self.f_2(F.gelu(self.f_1(self.ln(x))))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.f_attn, self.f_mlp = SelfAttention(width, heads, causal), MLP(width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, N, D)
        return self.f_mlp(self.f_attn(x))


class TextInput(nn.Module):
    """Token plus position."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(torch.randn(vocab_size, width) * 0.02)
        self.w_pos = nn.Parameter(torch.randn(length, width) * 0.01)

    def forward(self, ids: Tensor) -> Tensor:                                                  # (B, L) -> (B, L, D)
        return F.embedding(ids, self.w_voc) + self.w_pos


class ImageInput(nn.Module):
    """The time's token, then one a patch, each with its position."""

    def __init__(self, size: int, patch: int, times: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.patch_proj = nn.Parameter(torch.randn(width, 3, patch, patch) * (2 / (width * patch**2)) ** 0.5)
        self.w_pos = nn.Parameter(torch.randn(1 + (size // patch) ** 2, width) * width**-0.5)
        self.w_t = nn.Parameter(torch.randn(times, width) * width**-0.5)
        self.ln = Norm(width)

    def forward(self, image: Tensor, t: Tensor) -> Tensor:                                     # (B, 3, H, W), (B,)
        mean, std = (image.new_tensor(c)[:, None, None] for c in (PIXEL_MEAN, PIXEL_STD))
        pixels = ((image + 1) * 127.5 - mean) / std
        patches = F.conv2d(pixels, self.patch_proj, stride=self.patch).flatten(2).transpose(1, 2)
        return self.ln(torch.cat([self.w_t[t][:, None], patches], dim=1) + self.w_pos)         # (B, 1 + patches, D)


class Output(nn.Module):
    """Norm, then a projection to the common space."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.ln, self.f = Norm(width), Affine(width, embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, D) -> (B, E)
        return self.f(self.ln(x))


def named_blocks(layers: int, width: int, heads: int, causal: bool, first: nn.Module, last: nn.Module) -> nn.ModuleDict:
    """The blocks of a transformer under their published names."""
    blocks = {f"block_{i}": Block(width, heads, causal) for i in range(layers)}
    return nn.ModuleDict({"input": first, **blocks, "output": last})


class TextEncoder(nn.Module):
    """A causal transformer; the embedding is read off at the prompt's end token."""

    def __init__(self, c: NoisyClipConfig) -> None:
        super().__init__()
        width = c.text_heads * c.head_channels
        first, last = TextInput(c.vocab_size, c.length, width), Output(width, c.embedding)
        self.blocks = named_blocks(c.text_layers, width, c.text_heads, True, first, last)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: (B, L) int64, full length; mask: (B, L) bool, True up to the end token. Returns (B, E) of length 1."""
        *blocks, output = self.blocks.values()
        x = ids
        for block in blocks:
            x = block(x)
        end = mask.sum(dim=1) - 1                                                              # (B,)
        return F.normalize(output(x[torch.arange(len(x)), end]), dim=1)


class ImageEncoder(nn.Module):
    """A transformer over patches; the embedding is read off at the time's token."""

    def __init__(self, c: NoisyClipConfig) -> None:
        super().__init__()
        width = c.image_heads * c.head_channels
        first, last = ImageInput(c.image_size, c.patch, c.times, width), Output(width, c.embedding)
        self.blocks = named_blocks(c.image_layers, width, c.image_heads, False, first, last)

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        """image: (B, 3, H, W), [-1, 1] and noise; t: (B,) int64 times of the process. Returns (B, E) of length 1."""
        first, *blocks, output = self.blocks.values()
        x = first(image, t)
        for block in blocks:
            x = block(x)
        return F.normalize(output(x[:, 0]), dim=1)


class NoisyClip(nn.Module):
    """Both encoders and the scale of their similarity, exp(log 100)."""

    SCALE = 100.0

    def __init__(self, config: NoisyClipConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder, self.image_encoder = TextEncoder(config), ImageEncoder(config)
        self.tokenizer = tokenizer(config.length)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, E), each of length 1."""
        tokens, device = self.tokenizer.encode(texts), self.text_encoder.blocks["input"].w_voc.device
        return self.text_encoder(tokens.ids.to(device), tokens.mask.to(device))

    def similarity(self, text: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """(B,) 100 cos(text, image). text: (B, E) of the text encoder; image: (B, 3, H, W); t: (B,) int64."""
        return self.SCALE * (text * self.image_encoder(image, t)).sum(dim=1)


class NoisyClipTokenizer(ClipTokenizer):
    """CLIP's vocabulary, padded with 0; HTML entities become what they stand for, once and again, as in CLIP's data."""

    def tokens_of(self, text: str) -> list[int]:
        return super().tokens_of(html.unescape(html.unescape(text)))


def tokenizer(length: int = 77) -> NoisyClipTokenizer:
    """The tokenizer of the text encoder."""
    return NoisyClipTokenizer.clip(length, pad=0)
