"""Which kernel computes softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), and how its arguments are cut.

There are two, equal to rounding: torch's fused one, and ours over slices of query rows (see sliced_attention); "mixed"
is the first forward and the second backward.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from models.fused_attention import fused_attention
from models.processor import has_amx
from models.sliced_attention import sliced_attention

AttentionKind = Literal["auto", "sliced", "fused", "mixed"]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, kind: AttentionKind = "auto") -> Tensor:
    """Multi-head attention over already projected tokens; the softmax is accumulated in float32.

    q: (B, N, H, d); k, v: (B, M, H, d), of any strides. Returns (B, N, H*d) in q's dtype.
    causal: position i sees positions up to i only (text transformers); needs N == M. kind: "auto" is what was faster
    where it was measured, see `best_kind`. Raises ValueError for a kind that there is not.
    """
    if kind not in get_args(AttentionKind):
        raise ValueError(f"the kernels of attention are {', '.join(get_args(AttentionKind))}; {kind!r} is none of them")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                           # (B, H, N, d)
    kind = best_kind(q) if kind == "auto" else kind
    if kind == "fused":
        out = fused_attention(q, k, v, causal)
    else:
        out = sliced_attention(q, k, v, causal, fused_forward=kind == "mixed")
    return out.transpose(1, 2).flatten(2)


def best_kind(q: Tensor) -> AttentionKind:
    """The faster kernel for queries on this device in this dtype.

    torch's kernel for CPUs multiplies bfloat16 in float32: backward always, forward where there is no AMX.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return "fused"
    return "mixed" if has_amx() else "sliced"


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*d) -> (B, N, H, d)."""
    return x.unflatten(2, (heads, -1))


def split(x: Tensor, heads: int, parts: int, heads_first: bool = True) -> tuple[Tensor, ...]:
    """A projection (B, N, H*parts*d) in `parts` tensors (B, N, H, d), views of it.

    heads_first: it is stored head by head, the parts of each; otherwise part by part.
    """
    return x.unflatten(2, (heads, parts, -1)).unbind(3) if heads_first else x.unflatten(2, (parts, heads, -1)).unbind(2)
