"""The two ways in which an image reads a text, and how it looks at itself without one.

All treat the h*w positions of a feature map as tokens. A spatial transformer has blocks of self-attention among them,
cross-attention to the context and a feed-forward (see `transformer`). Joint attention is one attention over the context
and the positions together (Nichol et al. 2022, section 3).
"""

import torch
from torch import Tensor, nn

from models import fused_linear
from models.attend import attend, split
from models.condition import Condition
from models.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    Pointwise,
    for_each,
    fresh,
    heard,
    map_of,
    plain,
    plus,
    plus_linear,
    tokens_of,
    zero,
)  # fmt: skip
from models.transformer import TransformerBlock


class ImageAttention(nn.Module):
    """Positions look at each other, added to the feature map.

    heads_first: the projection is stored head by head, query, key and value of each; otherwise all queries first, then
    all keys. The files of openai/guided-diffusion @ 22e0df8, unet.py, have either ("new attention order": the latter).
    """

    def __init__(self, channels: int, heads: int, groups: int, heads_first: bool) -> None:
        super().__init__()
        self.heads, self.heads_first = heads, heads_first
        self.norm = GroupNorm(groups, channels, eps=1e-5)
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.proj_out = zero(Pointwise(channels, channels, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        def look(x: Tensor) -> Tensor:
            q, k, v = split(self.qkv(tokens_of(self.norm(x))), self.heads, 3, self.heads_first)
            return attend(q, k, v, kind=cond.attention)                             # (B, h*w, C)

        out = cond.run(cond.checkpointing, self, look, x)
        return plus(map_of(fresh(self.proj_out, out), x.shape[2]), x)


class JointAttention(nn.Module):
    """Positions look at the text and at each other in one softmax, added to the feature map.

    Parameters are those of openai/glide-text2im @ 69b5307, unet.py, whose projections are stored head by head:
    query, key and value of the first head, then of the second.
    """

    reads = ("context",)

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps=1e-5)
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.encoder_kv = Pointwise(context_dim, 2 * channels, 1)
        self.proj_out = zero(Pointwise(channels, channels, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        def look(x: Tensor, context: Tensor) -> Tensor:
            q, k, v = split(self.qkv(tokens_of(self.norm(x))), self.heads, 3)       # (B, h*w, H, d) each
            text_k, text_v = split(self.encoder_kv(context), self.heads, 2)         # (B, L, H, d) each
            k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
            return attend(q, k, v, kind=cond.attention)                             # (B, h*w, C)

        x = for_each(x, cond.context)
        out = cond.run(cond.checkpointing, self, look, x, cond.context)
        return plus(map_of(fresh(self.proj_out, out), x.shape[2]), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it.

    linear_proj: project in and out by linear layers (SD 2.x) instead of 1x1 convolutions (SD 1.x). The numbers are
    the same; the shapes in the files are not.
    """

    reads = ("context",)

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int, depth: int, linear_proj: bool) -> None:
        super().__init__()

        def projection() -> nn.Module:
            return Linear(channels, channels) if linear_proj else Conv2d(channels, channels, 1)

        self.linear_proj = linear_proj
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = zero(projection())

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, C, h, w)
        *blocks, last = self.transformer_blocks

        def transform(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
            tokens = self._tokens(self.proj_in, self.norm(x))                       # (B, h*w, C)
            inner = cond._replace(context=context)
            for block in blocks:
                tokens = block(tokens, inner)
            if type(last) is not TransformerBlock or heard(last):                   # it has to be called
                return last(tokens, inner), None
            return last.all_but_the_last(tokens, inner)

        tokens, thought = cond.run("blocks", self, transform, x, cond.context)
        tokens = tokens if thought is None else last.last(tokens, thought)
        return self._added(for_each(x, tokens), tokens)

    def _tokens(self, project: nn.Module, x: Tensor) -> Tensor:
        if self.linear_proj:
            return project(tokens_of(x))
        return tokens_of(project(x))

    def _added(self, x: Tensor, tokens: Tensor) -> Tensor:                          # (B, C, h, w), (B, h*w, C)
        project, height = self.proj_out, x.shape[-2]
        if self.linear_proj or plain(project) and fused_linear.is_worth_it(tokens):
            return map_of(plus_linear(tokens_of(x), project, tokens), height)
        return plus(fresh(project, map_of(tokens, height)), x)
