"""Which kernel computes softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

There are two, equal to rounding: torch's fused one, and ours over slices of query rows (see sliced_attention).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.sliced_attention import sliced_attention

AttentionKind = Literal["auto", "sliced", "fused"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, kind: AttentionKind = "auto"
) -> Tensor:
    """Multi-head attention over already projected tokens; the softmax is accumulated in float32.

    q: (B, N, heads*d); k, v: (B, M, heads*d). Returns (B, N, heads*d) in q's dtype.
    causal: position i sees positions up to i only (text transformers); needs N == M. kind: "auto" is what was faster
    where it was measured, see `best_kind`.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    sliced = (best_kind(q) if kind == "auto" else kind) == "sliced"
    out = sliced_attention(q, k, v, causal) if sliced else F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b h n d -> b n (h d)")


def best_kind(q: Tensor) -> AttentionKind:
    """The faster kernel for queries on this device in this dtype.

    The fused one, except in bfloat16 on a CPU: there it gains nothing over float32, and two matrix products over
    slices take less than half its time.
    """
    return "sliced" if q.dtype == torch.bfloat16 and q.device.type == "cpu" else "fused"
