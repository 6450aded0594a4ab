"""The two ways in which an image reads a text, and how it looks at itself without one.

All treat the h*w positions of a feature map as tokens. A spatial transformer has self-attention among them,
cross-attention to the context and a gated feed-forward, each with its own layer norm and residual (Rombach et al.
2022, appendix E.2.1). Joint attention is one attention over the context and the positions together (Nichol et al.
2022, section 3).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attend import AttentionKind, attend
from models.layers import Condition, zero


class Attention(nn.Module):
    """Attention from x to a context, or to x itself. Queries, keys and values carry no bias, the output does."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, kind: AttentionKind = "auto") -> Tensor:    # (B, N, C), (B, L, D)
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, kind=kind))


class GEGLU(nn.Module):
    """A linear layer whose second half, through GELU, gates the first (Shazeer 2020, GEGLU)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:                                         # (B, N, c_in) -> (B, N, c_out)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. (The published names leave a gap at net.1 for a dropout.)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:                                         # (B, N, C)
        return self.net(x)


class TransformerBlock(nn.Module):
    """Look around, read the text, think: three residual branches, each behind a layer norm."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels, eps=1e-5) for _ in range(3))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, N, C)
        def look(x: Tensor) -> Tensor:
            y = self.norm1(x)
            return x + self.attn1(y, y, cond.attention)

        def read(x: Tensor, context: Tensor) -> Tensor:
            return x + self.attn2(self.norm2(x), context, cond.attention)

        def think(x: Tensor) -> Tensor:
            return x + self.ff(self.norm3(x))

        x = cond.run("attention", self, look, x)
        x = cond.run("attention", self, read, x, cond.context)
        return cond.run("attention", self, think, x)


def split(x: Tensor, heads: int, parts: int, heads_first: bool = True) -> Tensor:
    """A projection (B, heads*parts*d, N) in `parts` tensors (B, N, heads*d), of the order in which it is stored."""
    stored = "(h p d)" if heads_first else "(p h d)"
    return rearrange(x, f"b {stored} n -> p b n (h d)", h=heads, p=parts)


class ImageAttention(nn.Module):
    """Positions look at each other, added to the feature map.

    heads_first: the projection is stored head by head, query, key and value of each; otherwise all queries first, then
    all keys. The files of openai/guided-diffusion @ 22e0df8, unet.py, have either ("new attention order": the latter).
    """

    def __init__(self, channels: int, heads: int, heads_first: bool) -> None:
        super().__init__()
        self.heads, self.heads_first = heads, heads_first
        self.norm = nn.GroupNorm(32, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        def look(x: Tensor) -> Tensor:
            q, k, v = split(self.qkv(self.norm(x).flatten(2)), self.heads, 3, self.heads_first)    # (B, h*w, C) each
            return x + self.proj_out(attend(q, k, v, self.heads, kind=cond.attention).transpose(1, 2)).view_as(x)

        return cond.run(cond.checkpointing, self, look, x)


class JointAttention(nn.Module):
    """Positions look at the text and at each other in one softmax, added to the feature map.

    Parameters are those of openai/glide-text2im @ 69b5307, unet.py, whose projections are stored head by head:
    query, key and value of the first head, then of the second.
    """

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(context_dim, 2 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        def look(x: Tensor, context: Tensor) -> Tensor:
            q, k, v = split(self.qkv(self.norm(x).flatten(2)), self.heads, 3)       # (B, h*w, C) each
            text_k, text_v = split(self.encoder_kv(context.transpose(1, 2)), self.heads, 2)    # (B, L, C) each
            k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)     # (B, L + h*w, C)
            return x + self.proj_out(attend(q, k, v, self.heads, kind=cond.attention).transpose(1, 2)).view_as(x)

        return cond.run(cond.checkpointing, self, look, x, cond.context)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it.

    linear_proj: project in and out by linear layers (SD 2.x) instead of 1x1 convolutions (SD 1.x). The numbers are
    the same; the shapes in the files are not.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, linear_proj: bool) -> None:
        super().__init__()

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear_proj else nn.Conv2d(channels, channels, 1)

        self.linear_proj = linear_proj
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = zero(projection())

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        def transform(x: Tensor, context: Tensor) -> Tensor:
            tokens = self._tokens(self.proj_in, self.norm(x))                       # (B, h*w, C)
            for block in self.transformer_blocks:
                tokens = block(tokens, cond._replace(context=context))
            return x + self._map(self.proj_out, tokens, x.shape[-2])

        return cond.run("blocks", self, transform, x, cond.context)

    def _tokens(self, project: nn.Module, x: Tensor) -> Tensor:
        if self.linear_proj:
            return project(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(project(x), "b c h w -> b (h w) c")

    def _map(self, project: nn.Module, tokens: Tensor, height: int) -> Tensor:
        if self.linear_proj:
            return rearrange(project(tokens), "b (h w) c -> b c h w", h=height)
        return project(rearrange(tokens, "b (h w) c -> b c h w", h=height))
