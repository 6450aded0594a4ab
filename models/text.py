"""The text transformer of CLIP and OpenCLIP: token ids to one feature vector a position.

Both are causal transformers with the norm before each branch; they differ in size and in the activation. Padding is
attended to like any token, as it was in training, so there is no mask. A learned word is a few more rows for the
token table, and the table is neither resized nor copied for it: ids at or beyond the vocabulary read from `extra`,
which is then the only tensor that receives a gradient.

Parameter names are those of the Hugging Face files without their `text_model.`.
Source: Radford et al. 2021, section 2.4; Gal et al. 2022 (Textual Inversion), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attend import attend, by_head
from models.errors import ModelError
from models.layers import Linear


class TextFeatures(NamedTuple):
    """context: (B, L, D) features of every position; pooled: (B, E) one vector a prompt. Either may be None."""

    context: Tensor | None
    pooled: Tensor | None = None


@dataclass(frozen=True)
class ClipTextConfig:
    """A text transformer in numbers. `layers` is how many run: Stable Diffusion 2.x runs 23 of OpenCLIP's 24."""

    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        require_heads(self.width, self.heads)


def require_heads(width: int, heads: int) -> None:
    """Raise ModelError unless a text transformer of this width can have so many heads."""
    if heads < 1 or width % heads:
        raise ModelError(f"a text transformer {width} wide cannot be divided among {heads} heads")


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def token_vectors(table: Tensor, ids: Tensor, extra: Tensor | None) -> Tensor:
    """Look tokens up in a table (V, D), and those at or beyond V in `extra` (n, D), which stays differentiable.

    ids: (B, L) int64 in 0..V+n-1. Returns (B, L, D) in the table's dtype. An id beyond both is an
    IndexError on a CPU, and CUDA's own assertion there.
    """
    if extra is None:
        return F.embedding(ids, table)
    known = F.embedding(ids.clamp(max=len(table) - 1), table)
    learned = F.embedding((ids - len(table)).clamp(min=0), extra).to(table.dtype)
    return torch.where((ids >= len(table))[..., None], learned, known)


def require_vectors(table: Tensor, ids: Tensor, extra: Tensor | None) -> None:
    """Raise ModelError unless `extra` (n, D) has a vector for every id that is at or beyond a table (V, D).

    ids: (B, L) int64. A plan's, which have no values, are not looked at.
    """
    known, (rows, width) = type(ids) is Tensor and ids.device.type != "meta" and ids.numel() > 0, table.shape
    needed = max(int(ids.max()) + 1 - rows, 0) if known else 0
    if extra is None and not needed:
        return
    if extra is None or extra.ndim != 2 or extra.shape[1] != width or len(extra) < needed:
        raise ModelError(
            f"the prompts read {needed} learned vectors of width {width}, and given are "
            f"{'none' if extra is None else tuple(extra.shape)}: give ({needed or 'n'}, {width}), those of all words, "
            "in the order in which the tokenizer was told of them"
        )


class Embeddings(nn.Module):
    """Token plus position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: Tensor, extra: Tensor | None) -> Tensor:                            # (B, L, D)
        tokens = token_vectors(self.token_embedding.weight, ids, extra)
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Causal self-attention, every projection with a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        q, k, v = (by_head(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, causal=True))


class MLP(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each a residual branch behind a layer norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-5)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Stack(nn.Module):
    """Layers in a row."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:                                                    # (B, L, D)
        for layer in self.layers:
            x = layer(x)
        return x


class ClipText(nn.Module):
    """CLIP's text transformer up to its final norm: what Stable Diffusion conditions on."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, ids: Tensor, extra: Tensor | None = None) -> TextFeatures:
        """ids: (B, L) int64, L at most `config.length`; extra: (n, D) rows for the ids from vocab_size on.

        Returns features of shape (B, L, D) in the network's dtype; nothing is pooled.
        """
        return TextFeatures(self.final_layer_norm(self.encoder(self.embeddings(ids, extra))))
