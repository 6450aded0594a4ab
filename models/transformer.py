"""The block of a transformer that reads a text: self-attention, cross-attention, a gated feed-forward.

Each is a residual branch behind a layer norm of its own (Rombach et al. 2022, appendix E.2.1). What is frozen adds the
branch in the branch's last product, and on a CPU goes through the tokens in parts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fused_linear
from models.attend import AttentionKind, attend, by_head
from models.checkpointing import records
from models.condition import Condition
from models.frozen import geglu
from models.layers import Linear, as_written, for_each, heard, plain, plus_linear, trains

PART_BYTES, PART_ROWS = 20 * 2**20, 512    # of what a feed-forward has widened; products of fewer rows are slower


@as_written
class Attention(nn.Module):
    """Attention from x to a context, or to x itself. Queries, keys and values carry no bias, the output does."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim, channels, bias=False)
        self.to_v = Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, kind: AttentionKind) -> Tensor:    # (B, N, C), (B, L, D)
        return self.to_out(self.all_but_the_last(x, context, kind))

    def all_but_the_last(self, x: Tensor, context: Tensor, kind: AttentionKind) -> Tensor:      # what the heads found
        q, k, v = (by_head(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return attend(q, k, v, kind=kind)

    def added(self, x: Tensor, found: Tensor) -> Tensor:                            # (B, N, C) both
        return plus_linear(x, self.to_out[0], found)

    def ends_as_written(self) -> bool:
        """Whether nothing was put to its last layer."""
        return type(self.to_out) is nn.Sequential and len(self.to_out) == 1 and not heard(self.to_out)


@as_written
class GEGLU(nn.Module):
    """A linear layer whose second half, through GELU, gates the first (Shazeer 2020, GEGLU).

    On a CPU it takes a part of the tokens at a time, so that what it makes of them, eight times as wide, stays small.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:                                         # (B, N, c_in) -> (B, N, c_out)
        if trains(self.proj):                                   # autograd may be asked for any derivative of it
            value, gate = self.proj(x).chunk(2, dim=-1)
            return value * F.gelu(gate)
        if not plain(self.proj):
            return geglu(self.proj(x))
        if fused_linear.is_worth_it(x):
            return fused_linear.linear_geglu(x, self.proj.weight, self.proj.bias)
        rows = self.rows(x)
        if x.device.type != "cpu" or x.shape[:2].numel() <= rows:
            return geglu(self.proj(x))
        return torch.cat([geglu(self.proj(part)) for part in x.flatten(0, 1).split(rows)]).unflatten(0, x.shape[:2])

    def rows(self, x: Tensor) -> int:
        """How many tokens are widened at a time: as many as take PART_BYTES then, or PART_ROWS."""
        return max(PART_ROWS, PART_BYTES // (self.proj.out_features * x.element_size()))


@as_written
class FeedForward(nn.Module):
    """GEGLU to four times the width, and back. (The published names leave a gap for a dropout.)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:                                         # (B, N, C)
        return self.net(x)

    def all_but_the_last(self, x: Tensor) -> Tensor:                                # (B, N, C) -> (B, N, 4C)
        return self.net[0](x)

    def added(self, x: Tensor, widened: Tensor) -> Tensor:                          # (B, N, C), (B, N, 4C)
        return plus_linear(x, self.net[2], widened)

    def ends_as_written(self) -> bool:
        """Whether nothing was put to its last layer, nor into the gap before it."""
        three = type(self.net) is nn.Sequential and len(self.net) == 3 and not heard(self.net)
        return three and type(self.net[1]) is nn.Identity and not heard(self.net[1])

    def goes_in_parts(self, x: Tensor, norm: nn.LayerNorm) -> bool:
        """Whether nothing is recorded on a CPU, and nobody is to see a part where there was a batch."""
        widen, _, narrow = self.net
        alone = type(widen) is GEGLU and not heard(widen) and all(map(plain, (widen.proj, narrow, norm)))
        return alone and x.device.type == "cpu" and not records()

    def add_in_parts(self, x: Tensor, norm: nn.LayerNorm) -> None:
        """x += self(norm(x)) of a contiguous x, (B, N, C), where nothing is recorded.

        A part of the tokens is widened and narrowed before the next is, in the same memory: new pages would cost more
        than the arithmetic.
        """
        for part in x.view(1, -1, x.shape[-1]).split(self.net[0].rows(x), dim=1):
            part.copy_(self.added(part, self.all_but_the_last(norm(part))))


@as_written
class TransformerBlock(nn.Module):
    """Look around, read the text, think: three residual branches, each behind a layer norm.

    The linear layer that ends a branch stands outside of its checkpoint: frozen, it keeps nothing anyway, and so it is
    not computed a second time. For the checkpoint of a whole transformer the last of them is a method of its own:
    forward is `last` of `all_but_the_last`. (Unrecorded on a CPU, or with an `ff` of one's own, there is none.)

    attn1, attn2, ff: may be replaced by modules of one's own, (x, context, kind) -> (B, N, C) and x -> (B, N, C), and
    ours may be hooked, derived or lengthened: they are called then, and their answer is added as it is.
    """

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels, eps=1e-5) for _ in range(3))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:                        # (B, N, C)
        return self.last(*self.all_but_the_last(x, cond))

    def all_but_the_last(self, x: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:   # (B, N, C), (B, N, 4C)
        # asked once: a hook may take itself out, or put another in, on the way
        ours = {layer: is_ours(layer) for layer in (self.attn1, self.attn2, self.ff)}

        def ahead(layer: nn.Module, *inputs: Any) -> Tensor:
            return layer.all_but_the_last(*inputs) if ours[layer] else layer(*inputs)

        def added(layer: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
            return layer.added(x, branch) if ours[layer] else x + branch

        def look(x: Tensor) -> Tensor:
            y = self.norm1(x)
            return ahead(self.attn1, y, y, cond.attention)

        def read(x: Tensor, context: Tensor) -> Tensor:
            return ahead(self.attn2, self.norm2(x), context, cond.attention)

        def think(x: Tensor) -> Tensor:
            return ahead(self.ff, self.norm3(x))

        x = added(self.attn1, x, cond.run("attention", self, look, x))
        x = for_each(x, cond.context)
        x = added(self.attn2, x, cond.run("attention", self, read, x, cond.context))
        if ours[self.ff] and self.ff.goes_in_parts(x, self.norm3):
            x = x.contiguous()                          # somebody's own layer may have laid it otherwise
            self.ff.add_in_parts(x, self.norm3)
            return x, None
        thought = cond.run("attention", self, think, x)
        return (x, thought) if ours[self.ff] else (x + thought, None)

    def last(self, x: Tensor, thought: Tensor | None) -> Tensor:
        return x if thought is None else self.ff.added(x, thought)


def is_ours(layer: nn.Module) -> bool:
    """Whether a branch is one of those here and nothing more, so that its last product may be made with the addition
    that follows it.
    """
    return type(layer) in (Attention, FeedForward) and not heard(layer) and layer.ends_as_written()
