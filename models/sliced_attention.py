"""Attention a slice at a time, forward and backward, so that no full score matrix ever exists.

    S = q k^T / sqrt(d),   P = softmax(S),   O = P v

A slice is some query rows of some heads of one sample. A row of P needs no other row, so the backward pass computes
the slice of P anew from q and k, which are kept with v and nothing else, and applies to it

    dv = P^T dO,   dP = dO v^T,   dS = P * (dP - rowsum(P * dP)),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d)

Products run in the inputs' dtype and softmax within float32, as torch's kernels do (float64 for float64 inputs);
scores of float16, which overflow in Stable Diffusion 2.x, are computed in float32; dk and dv are summed in float32.
Scores of bfloat16 are rounded to it, as products are there: of large scores, of which one outweighs all others,
gradients are worse than those of torch's kernel, which holds them in float32 (dq by 2.4 % against 0.5 % at a standard
deviation of 9, by 0.5 % against 0.2 % at 1).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models.fused_attention import fused_attention
from models.once import once_differentiable

# Of scores. On a CPU products of few rows are slow, and beyond two megabytes heads are better taken one at a time; on a
# GPU few kernels count for more.
CPU_SLICE_BYTES, CPU_HEADS_BYTES, GPU_SLICE_BYTES = 8 * 2**20, 2 * 2**20, 64 * 2**20


def slice_size(q: Tensor, k: Tensor, budget: int | None = None) -> tuple[int, int]:
    """How many heads and how many query rows at a time keep the scores of a slice within `budget` bytes,
    in q's dtype (of float16, whose scores are in float32, twice as many).

    q: (B, H, N, d), k: (B, H, M, d). Rows come first: several heads only where all rows of each fit. At least one of
    each, whatever the budget. None: what suits the device.
    """
    of_rows = of_heads = budget
    if budget is None:
        of_rows, of_heads = (CPU_SLICE_BYTES, CPU_HEADS_BYTES) if q.device.type == "cpu" else 2 * (GPU_SLICE_BYTES,)
    row = max(1, k.shape[2]) * q.element_size()
    rows = max(1, min(of_rows // row, q.shape[2]))
    return min(max(1, of_heads // (row * rows)), q.shape[1]), rows


def probabilities(q: Tensor, k_t: Tensor, first: int, causal: bool, s: Tensor, p: Tensor) -> None:
    """p = softmax(q k^T) of query rows first, first + 1, …, by way of the scores, s: both are (h, r, M).

    q: (h, r, d), already divided by sqrt(d); k_t: (h, d, M).
    """
    torch.bmm(q.to(s.dtype), k_t.to(s.dtype), out=s)
    if causal:
        row = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        s.masked_fill_(torch.arange(k_t.shape[2], device=q.device) > row, float("-inf"))
    if s.dtype == p.dtype:
        torch.softmax(s, dim=-1, out=p)
    else:
        p.copy_(s.softmax(dim=-1))


class _SlicedAttention(torch.autograd.Function):
    """apply(q, k, v, causal, heads, rows, fused_forward): q (B, H, N, d), k and v (B, H, M, d); the size of a slice.

    All slices of a pass use the same memory: on a CPU new pages would cost as much as a product.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, causal: bool, heads: int, rows: int, fused_forward: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.heads, ctx.rows = causal, heads, rows
        if fused_forward:
            return fused_attention(q, k, v, causal)
        out, memory = empty_tokens(q), [_slice(q, k, heads, rows, dtype) for dtype in (_scores(q), q.dtype)]
        for i in some_heads(q, heads):
            scaled, k_t, v_i = (q[i] * q.shape[-1] ** -0.5).contiguous(), k[i].mT.contiguous(), v[i].contiguous()
            for some in some_rows(q, rows):
                s, p = _of_a_slice(memory, scaled[:, some])
                probabilities(scaled[:, some], k_t, some.start, causal, s, p)
                out[i][:, some] = p @ v_i
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (need_q, need_k, need_v, *_) = ctx.saved_tensors, ctx.needs_input_grad
        scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        d_out = d_out.to(q.dtype)                                       # another one if autocast made the output
        dq, dk, dv = (empty_tokens(x) if need else None for x, need in zip((q, k, v), ctx.needs_input_grad))
        memory = [_slice(q, k, ctx.heads, ctx.rows, dtype) for dtype in (_scores(q), q.dtype, q.dtype)]
        memory.append(memory[0] if memory[0].dtype == q.dtype else torch.empty_like(memory[1]))
        for i in some_heads(q, ctx.heads):
            scaled, k_i, d_i = (q[i] * scale).contiguous(), k[i].contiguous(), d_out[i].contiguous()    # (h, …, d)
            k_t, v_t = k_i.mT.contiguous(), v[i].mT.contiguous()                               # (h, d, M)
            sum_k, sum_v = 0, 0                                                                # (h, d, M)
            for some in some_rows(q, ctx.rows):
                q_s, d_s = scaled[:, some], d_i[:, some]                                       # (h, r, d)
                s, p, dp, ds = _of_a_slice(memory, q_s)                                        # (h, r, M)
                probabilities(q_s, k_t, some.start, ctx.causal, s, p)
                if need_v:
                    sum_v += (d_s.mT @ p).to(wide)                                             # p^T d is slower
                if need_q or need_k:
                    torch.bmm(d_s, v_t, out=dp)
                    torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
                if need_q:
                    dq[i][:, some] = (ds @ k_i) * scale
                if need_k:
                    sum_k += (q_s.mT @ ds).to(wide)
            for gradient, total in ((dk, sum_k), (dv, sum_v)):
                if gradient is not None:
                    gradient[i] = total.mT
        return dq, dk, dv, None, None, None, None


def _scores(q: Tensor) -> torch.dtype:
    """Of the scores: float32 for float16, in which they overflow."""
    return torch.float32 if q.dtype == torch.float16 else q.dtype


def _slice(q: Tensor, k: Tensor, heads: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Memory for a number of every query and key of a slice, (heads, rows, M) or less."""
    return q.new_empty(min(heads, q.shape[1]), min(rows, q.shape[2]), k.shape[2], dtype=dtype)


def _of_a_slice(memory: list[Tensor], q: Tensor) -> list[Tensor]:
    """What a slice with queries q (h, r, d) uses of the memory of all: the last ones are smaller."""
    return [each[: q.shape[0], : q.shape[1]] for each in memory]


def empty_tokens(x: Tensor) -> Tensor:
    """As x (B, H, N, d), with the heads of a token side by side in memory, where what comes next wants them."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def some_heads(q: Tensor, heads: int) -> Iterator[tuple[int, slice]]:
    """Indices of all samples and heads of q (B, H, N, d), at most `heads` of one sample at a time."""
    return ((b, slice(h, h + heads)) for b in range(q.shape[0]) for h in range(0, q.shape[1], heads))


def some_rows(q: Tensor, rows: int) -> Iterator[slice]:
    """All query rows of q (B, H, N, d), at most `rows` at a time."""
    return (slice(first, min(first + rows, q.shape[2])) for first in range(0, q.shape[2], rows))


def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, rows: int | None = None, fused_forward: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with memory bounded by a slice, in training too.

    q: (B, H, N, d); k, v: (B, H, M, d), all of one dtype; causal needs N == M. rows: query rows a slice, of one head;
    None for what suits the device. fused_forward: forward is torch's kernel, and only the backward pass goes by slices.
    Returns (B, H, N, d). Raises ValueError for rows below one.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"a slice needs at least one query row, not {rows}")
    return _SlicedAttention.apply(q, k, v, causal, *(slice_size(q, k) if rows is None else (1, rows)), fused_forward)
