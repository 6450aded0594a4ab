"""GLIDE's text transformer: byte-pair ids and a mask to one feature vector a position, and one for the whole prompt.

Every position sees every other, padding too; what tells padding apart is that its vectors are learned ones, a
position each. The empty prompt is all padding. The last position, projected, joins the time embedding of the UNet.

Parameter names are the published ones; GLIDE keeps them in the same file as its UNet's, and none is in both.
Source: Nichol et al. 2022 (GLIDE), section 3; openai/glide-text2im @ 69b5307, text2im_model.py and xf.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attend import attend, split
from models.layers import Linear
from models.text import TextFeatures, require_heads, token_vectors


@dataclass(frozen=True)
class GlideTextConfig:
    """A text transformer in numbers. pooled_dim: of the vector that joins the time embedding, 4 * model_channels."""

    vocab_size: int = 50257
    length: int = 128
    width: int = 512
    layers: int = 16
    heads: int = 8
    pooled_dim: int = 768

    def __post_init__(self) -> None:
        require_heads(self.width, self.heads)


class SelfAttention(nn.Module):
    """Attention of all positions to all; the projection is stored head by head, as in JointAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = Linear(width, 3 * width)
        self.c_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        return self.c_proj(attend(*split(self.c_qkv(x), self.heads, 3)))


class MLP(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each a residual branch behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks in a row."""

    def __init__(self, config: GlideTextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        for block in self.resblocks:
            x = block(x)
        return x


class GlideText(nn.Module):
    """Token plus position where there is text, a learned vector where there is none; then a transformer."""

    def __init__(self, config: GlideTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        self.padding_embedding = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        self.transformer = Transformer(config)
        self.final_ln = nn.LayerNorm(config.width, eps=1e-5)
        self.transformer_proj = Linear(config.width, config.pooled_dim)

    def forward(self, ids: Tensor, mask: Tensor, extra: Tensor | None = None) -> TextFeatures:
        """ids: (B, L) int64; mask: (B, L) bool, True where there is text; L is `config.length`.

        extra: (n, D) rows for the ids from vocab_size on. Returns context (B, L, D) and pooled (B, pooled_dim), both
        in the network's dtype.
        """
        text = token_vectors(self.token_embedding.weight, ids, extra) + self.positional_embedding
        x = torch.where(mask[..., None], text, self.padding_embedding)                         # (B, L, D)
        context = self.final_ln(self.transformer(x))
        return TextFeatures(context, self.transformer_proj(context[:, -1]))
