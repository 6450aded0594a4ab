"""Attention a few query rows at a time, forward and backward, so that no full score matrix ever exists.

    S = q k^T / sqrt(d),   P = softmax(S),   O = P v

Forward keeps q, k, v, O and one number a row, the log-sum-exp of its scores; backward recomputes a slice of P from
them and applies, slice by slice, the gradients of Dao et al. 2022 (FlashAttention), appendix B.2:

    dv = P^T dO,   dP = dO v^T,   dS = P * (dP - rowsum(dO * O)),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d)

Products run in the inputs' dtype, the softmax in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SLICE_BYTES = 64 * 2**20


def rows_per_slice(q: Tensor, k: Tensor, budget: int = SLICE_BYTES) -> int:
    """How many query rows at a time keep the float32 scores of a slice within `budget` bytes; at least one."""
    batch_and_heads = q.shape[0] * q.shape[1]
    return max(1, budget // (4 * batch_and_heads * k.shape[2]))


def scores(q: Tensor, k: Tensor, first: int, causal: bool) -> Tensor:
    """Scaled scores of query rows first, first+1, ... in at least float32. q: (B, H, r, d), k: (B, H, M, d)."""
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if causal:
        row = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
        s = s.masked_fill(torch.arange(k.shape[2], device=q.device) > row, float("-inf"))
    return s


class SlicedAttention(torch.autograd.Function):
    """apply(q, k, v, causal, rows): q (B, H, N, d), k and v (B, H, M, d), rows >= 1 query rows a slice."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, causal: bool, rows: int) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty_like(q[..., :1], dtype=torch.promote_types(q.dtype, torch.float32))
        for i in range(0, q.shape[2], rows):
            s = scores(q[:, :, i : i + rows], k, i, causal)
            total = lse[:, :, i : i + rows] = s.logsumexp(dim=-1, keepdim=True)
            out[:, :, i : i + rows] = s.sub_(total).exp_().to(q.dtype) @ v
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.rows = causal, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, (need_q, need_k, need_v, *_) = q.shape[-1] ** -0.5, ctx.needs_input_grad
        dq = torch.empty_like(q) if need_q else None
        dk, dv = (torch.zeros_like(x) if need else None for x, need in ((k, need_k), (v, need_v)))
        for i in range(0, q.shape[2], ctx.rows):
            rows = slice(i, i + ctx.rows)
            q_i, d_i = q[:, :, rows], d_out[:, :, rows]
            p = scores(q_i, k, i, ctx.causal).sub_(lse[:, :, rows]).exp_()
            if need_v:
                dv += p.to(q.dtype).mT @ d_i
            if need_q or need_k:
                inner = (d_i * out[:, :, rows]).sum(dim=-1, keepdim=True, dtype=p.dtype)
                ds = (p.mul_((d_i @ v.mT).sub(inner)) * scale).to(q.dtype)
                if need_q:
                    dq[:, :, rows] = ds @ k
                if need_k:
                    dk += ds.mT @ q_i
        return dq, dk, dv, None, None


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, rows: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with memory bounded by a slice, in training too.

    q: (B, H, N, d); k, v: (B, H, M, d), all of one dtype; causal needs N == M. rows: query rows a slice, chosen by
    a budget of 64 MiB of scores if None. Returns (B, H, N, d). Raises ValueError for rows below one.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"a slice needs at least one query row, not {rows}")
    return SlicedAttention.apply(q, k, v, causal, rows or rows_per_slice(q, k))
