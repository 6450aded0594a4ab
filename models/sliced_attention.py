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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from models.checkpointing import dear
from models.fused_attention import fused_attention
from models.once import once_differentiable
from models.processor import LANES, has_amx

# Of scores. On a CPU products of few rows are slow, where AMX multiplies more so, and beyond two megabytes heads are
# better taken one at a time; on a GPU few kernels count for more.
CPU_SLICE_BYTES, AMX_SLICE_BYTES, CPU_HEADS_BYTES, GPU_SLICE_BYTES = (n * 2**20 for n in (4, 8, 2, 64))


def slice_size(q: Tensor, k: Tensor, budget: int | None = None) -> tuple[int, int]:
    """How many heads and how many query rows at a time keep the scores of a slice within `budget` bytes,
    in q's dtype (of float16, whose scores are in float32, twice as many).

    q: (B, H, N, d), k: (B, H, M, d). Rows come first: several heads only where all rows of each fit. At least one of
    each, whatever the budget. None: what suits the device.
    """
    of_rows = of_heads = budget
    if budget is None:
        on_cpu = AMX_SLICE_BYTES if has_amx() else CPU_SLICE_BYTES, CPU_HEADS_BYTES
        of_rows, of_heads = on_cpu if q.device.type == "cpu" else 2 * (GPU_SLICE_BYTES,)
    row = max(1, k.shape[2]) * q.element_size()
    rows = max(1, min(of_rows // row, q.shape[2]))
    return max(1, min(of_heads // (row * rows), q.shape[1])), rows


def probabilities(q: Tensor, k_t: Tensor, first: int, causal: bool, s: Tensor) -> Tensor:
    """softmax(q k^T) of query rows first, first + 1, …, in the memory of the scores, s (h, r, M), and in q's dtype.

    q: (h, r, d), already divided by sqrt(d); k_t: (h, d, M). (Of float16 s is float32, and the memory another.)
    """
    torch.bmm(q.to(s.dtype), k_t.to(s.dtype), out=s)
    if causal:
        row = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        s.masked_fill_(torch.arange(k_t.shape[2], device=q.device) > row, float("-inf"))
    return torch.softmax(s, dim=-1, out=s).to(q.dtype)


def by_slices(q: Tensor, k: Tensor, v: Tensor, causal: bool, heads: int, rows: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of so many heads and rows at a time. Returns (B, H, N, d)."""
    out, memory = empty_tokens(q), _slice(q, k, heads, rows, _scores(q))
    for i in some_heads(q, heads):
        scaled, k_t, v_i = (q[i] * q.shape[-1] ** -0.5).contiguous(), k[i].mT.contiguous(), _whole(v[i])
        for some in some_rows(q, rows):
            q_s = scaled[:, some]
            p = probabilities(q_s, k_t, some.start, causal, _for(q_s, memory))                 # (h, r, M)
            out[i][:, some] = (p @ v_i)[..., : v.shape[-1]]
    return out


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

        def found() -> Tensor:
            return fused_attention(q, k, v, causal) if fused_forward else by_slices(q, k, v, causal, heads, rows)

        return dear(2 * k.shape[2], found)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (need_q, need_k, need_v, *_) = ctx.saved_tensors, ctx.needs_input_grad
        scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        d_out = d_out.to(q.dtype)                                       # another one if autocast made the output
        dq, dk, dv = (empty_tokens(x) if need else None for x, need in zip((q, k, v), ctx.needs_input_grad))
        memory, memory_d = (_slice(q, k, ctx.heads, ctx.rows, dtype) for dtype in (_scores(q), q.dtype))
        for i in some_heads(q, ctx.heads):
            scaled, k_i, d_i = (q[i] * scale).contiguous(), _whole(k[i]), d_out[i].contiguous()         # (h, …, d)
            k_t, v_t = k[i].mT.contiguous(), v[i].mT.contiguous()                              # (h, d, M)
            sum_k, sum_v = 0, 0                                                                # (h, d, M)
            for some in some_rows(q, ctx.rows):
                q_s, d_s = scaled[:, some], d_i[:, some]                                       # (h, r, d)
                p = probabilities(q_s, k_t, some.start, ctx.causal, _for(q_s, memory))         # (h, r, M)
                if need_v:
                    sum_v += (d_s.mT @ p).to(wide)                                             # p^T d is slower
                if need_q or need_k:
                    dp = torch.bmm(d_s, v_t, out=_for(q_s, memory_d))
                    ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
                if need_q:
                    dq[i][:, some] = (ds @ k_i)[..., : k.shape[-1]] * scale
                if need_k:
                    sum_k += (q_s.mT @ ds).to(wide)
            for gradient, total in ((dk, sum_k), (dv, sum_v)):
                if gradient is not None:
                    gradient[i] = total.mT if q.shape[2] else 0                                # of no queries
        return dq, dk, dv, None, None, None, None


def _whole(x: Tensor) -> Tensor:
    """x (h, M, d), contiguous; in bfloat16 on a CPU with zeros up to whole registers of channels.

    512 rows of 4096 numbers by 40 channels take 1.45 times as long as by 48 (without AMX).
    """
    missing = -x.shape[-1] % LANES if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 0
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _scores(q: Tensor) -> torch.dtype:
    """Of the scores: float32 for float16, in which they overflow."""
    return torch.float32 if q.dtype == torch.float16 else q.dtype


def _slice(q: Tensor, k: Tensor, heads: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Memory for a number of every query and key of a slice, (heads, rows, M) or less."""
    return q.new_empty(min(heads, q.shape[1]), min(rows, q.shape[2]), k.shape[2], dtype=dtype)


def _for(q: Tensor, memory: Tensor) -> Tensor:
    """What a slice with queries q (h, r, d) uses of the memory of all, (h, r, M): the last ones are smaller. In one
    piece, or the gradient of torch's softmax would be written elsewhere.
    """
    heads, rows, keys = q.shape[0], q.shape[1], memory.shape[2]
    return memory.flatten()[: heads * rows * keys].view(heads, rows, keys)


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
