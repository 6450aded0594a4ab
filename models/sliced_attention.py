"""Attention a slice at a time, forward and backward, so that no full score matrix ever exists.

    S = q k^T / sqrt(d),   P = softmax(S),   O = P v

A slice is some query rows of some heads of one sample. A row of P needs no other row, so the backward pass computes
the slice of P anew from q and k, which are kept with v and nothing else, and applies to it

    dv = P^T dO,   dP = dO v^T,   dS = P * (dP - rowsum(P * dP)),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d)

Products run in the inputs' dtype and softmax within float32, as torch's kernels do (float64 for float64 inputs);
scores of float16, which overflow in Stable Diffusion 2.x, are computed in float32; dk and dv are summed in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CPU_SLICE_BYTES = 2 * 2**20         # of scores: they stay in a core's cache from the first product to the second
GPU_SLICE_BYTES = 64 * 2**20        # there, few kernels count for more


def slice_size(q: Tensor, k: Tensor, budget: int | None = None) -> tuple[int, int]:
    """How many heads and how many query rows at a time keep the scores of a slice within `budget` bytes.

    q: (B, H, N, d), k: (B, H, M, d). Rows come first: several heads only where all rows of each fit. At least one of
    each, whatever the budget. None: what suits the device.
    """
    if budget is None:
        budget = CPU_SLICE_BYTES if q.device.type == "cpu" else GPU_SLICE_BYTES
    row = k.shape[2] * q.element_size()
    rows = min(max(1, budget // row), q.shape[2])
    return min(max(1, budget // (row * rows)), q.shape[1]), rows


def probabilities(q: Tensor, k: Tensor, first: int, causal: bool) -> Tensor:
    """softmax(q k^T) of query rows first, first + 1, … q: (h, r, d), already divided by sqrt(d); k: (h, M, d)."""
    s = q.float() @ k.float().mT if q.dtype == torch.float16 else q @ k.mT                     # (h, r, M)
    if causal:
        row = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        s.masked_fill_(torch.arange(k.shape[1], device=q.device) > row, float("-inf"))
    return s.softmax(dim=-1).to(q.dtype)


class _SlicedAttention(torch.autograd.Function):
    """apply(q, k, v, causal, heads, rows): q (B, H, N, d), k and v (B, H, M, d); heads and rows of a slice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, causal: bool, heads: int, rows: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.heads, ctx.rows = causal, heads, rows
        out = empty_tokens(q)
        for i in some_heads(q, heads):
            scaled = q[i] * q.shape[-1] ** -0.5                                                # (h, N, d)
            for j in range(0, q.shape[2], rows):
                p = probabilities(scaled[:, j : j + rows], k[i], j, causal)
                out[i][:, j : j + rows] = p @ v[i]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (need_q, need_k, need_v, *_) = ctx.saved_tensors, ctx.needs_input_grad
        scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (empty_tokens(x) if need else None for x, need in zip((q, k, v), ctx.needs_input_grad))
        for i in some_heads(q, ctx.heads):
            scaled, sum_k, sum_v = q[i] * scale, 0, 0                                          # the sums: (h, d, M)
            for j in range(0, q.shape[2], ctx.rows):
                some = slice(j, j + ctx.rows)
                p, d_i = probabilities(scaled[:, some], k[i], j, ctx.causal), d_out[i][:, some]
                if need_v:
                    sum_v += (d_i.mT @ p).to(wide)                                             # p^T d is slower
                if need_q or need_k:
                    ds = torch._softmax_backward_data(d_i @ v[i].mT, p, -1, p.dtype)           # (h, r, M)
                if need_q:
                    dq[i][:, some] = (ds @ k[i]) * scale
                if need_k:
                    sum_k += (scaled[:, some].mT @ ds).to(wide)
            for gradient, total in ((dk, sum_k), (dv, sum_v)):
                if gradient is not None:
                    gradient[i] = total.mT
        return dq, dk, dv, None, None, None


def empty_tokens(x: Tensor) -> Tensor:
    """As x (B, H, N, d), with the heads of a token side by side in memory, where what comes next wants them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def some_heads(q: Tensor, heads: int) -> Iterator[tuple[int, slice]]:
    """Indices of all samples and heads of q (B, H, N, d), at most `heads` of one sample at a time."""
    return ((b, slice(h, h + heads)) for b in range(q.shape[0]) for h in range(0, q.shape[1], heads))


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, rows: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with memory bounded by a slice, in training too.

    q: (B, H, N, d); k, v: (B, H, M, d), all of one dtype; causal needs N == M. rows: query rows a slice, of one head;
    None for what suits the device. Returns (B, H, N, d). Raises ValueError for rows below one.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"a slice needs at least one query row, not {rows}")
    return _SlicedAttention.apply(q, k, v, causal, *(slice_size(q, k) if rows is None else (1, rows)))
