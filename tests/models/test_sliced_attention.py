"""Sliced attention against the plain formula: the same value and the same gradients, whatever the slice."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._saved_bytes import SavedBytes
from models.attend import AttentionKind, attend
from models.sliced_attention import _SlicedAttention, _whole, slice_size, sliced_attention


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    s = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v


def inputs(n: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(n * 100 + m)
    shapes = (2, 3, n, 5), (2, 3, m, 5), (2, 3, m, 5), (2, 3, n, 5)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("fused_forward", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize(("n", "m", "causal"), [(13, 7, False), (1, 7, False), (13, 13, True)])
def test_equals_the_plain_formula_in_float64(n: int, m: int, causal: bool, rows: int, fused_forward: bool) -> None:
    q, k, v, g = inputs(n, m, torch.float64)
    ours, theirs = sliced_attention(q, k, v, causal, rows, fused_forward), plain(q, k, v, causal)
    # 1e-13: a few hundred float64 roundings (2e-16) of numbers of order one
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 1, 2e-6), (torch.bfloat16, 1, 3e-2), (torch.float16, 1, 3e-3), (torch.float16, 150, 3e-3)],
)
def test_rounds_like_its_dtype(dtype: torch.dtype, scale: float, tolerance: float) -> None:
    """Queries and keys of 150 have scores beyond 65504, which float16 does not hold."""
    # ten float32 roundings (1.2e-7), a handful of bfloat16 roundings (4e-3) and of float16 ones (5e-4), of numbers up
    # to about two
    q, k, v, g = inputs(33, 17, dtype)
    q, k = ((scale * x.detach()).requires_grad_() for x in (q, k))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert ((exact[0] @ exact[1].mT).abs().max() / math.sqrt(5) > 65504) == (scale > 1)
    ours, theirs = sliced_attention(q, k, v, rows=8), plain(*exact, causal=False)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, exact, g.double())):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=2 * tolerance)


def test_gradients_of_many_slices_are_as_near_as_those_of_one() -> None:
    q, k, v, g = inputs(300, 300, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(plain(*exact, causal=False), exact, g.double())
    off = []
    for rows in (1, 300):
        found = torch.autograd.grad(sliced_attention(q, k, v, rows=rows), (q, k, v), g)
        off.append(torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, wanted)]))
    # each slice is rounded as the whole is, and their sum in float32 not at all; summed in bfloat16, 300 roundings that
    # grow with the sum, it would be off by three times as much
    assert (off[0] < 1.5 * off[1]).all()


def test_only_the_gradients_that_are_asked_for() -> None:
    q, k, v, g = inputs(9, 9, torch.float64)
    frozen = sliced_attention(q.detach(), k, v.detach(), rows=2)
    wanted = torch.autograd.grad(plain(q, k, v, False), k, g)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen, k, g)[0], wanted, rtol=0, atol=1e-13)


def test_a_second_derivative_is_an_error() -> None:
    q, k, v, _ = inputs(5, 5, torch.float64)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sliced_attention(q, k, v, rows=2).square().sum(), q, create_graph=True)


def test_slices_follow_the_byte_budget() -> None:
    q, k = torch.empty(2, 8, 4096, 40, device="meta"), torch.empty(2, 8, 77, 40, device="meta")
    assert slice_size(q, q, budget=4 * 4096 * 100) == (1, 100)
    assert slice_size(q, k, budget=4 * 4096 * 77 * 3) == (3, 4096)
    assert slice_size(q, k, budget=2**40) == (8, 4096)
    assert slice_size(q, k, budget=1) == (1, 1)
    assert slice_size(q.bfloat16(), k, budget=2 * 77 * 5) == (1, 5)


def test_on_a_cpu_slices_of_several_heads_are_smaller() -> None:
    q = torch.empty(1, 8, 1024, 1)
    assert slice_size(q, q) == (1, 1024)                                                       # 4 MiB of one head
    assert slice_size(q[:, :, :256], q) == (2, 256)
    assert slice_size(q.to("meta"), q) == (8, 1024)                                            # as of a GPU: 64 MiB


def test_slices_of_some_heads_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three heads two fit, and the last one comes by itself."""
    q, k, v, g = inputs(13, 7, torch.float64)
    monkeypatch.setattr("models.sliced_attention.CPU_HEADS_BYTES", 2 * 13 * 7 * q.element_size())
    assert slice_size(q, k) == (2, 13)
    ours, theirs = sliced_attention(q, k, v), plain(q, k, v, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)                               # as above
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_memory_is_bounded_by_a_slice() -> None:
    """Nothing but q, k and v is kept, and nothing larger than a slice's scores is made, forward or backward."""
    q, k, v, g = (x.to(torch.float32) for x in inputs(64, 48, torch.float64))
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(x.untyped_storage().nbytes() for x in (out,) if isinstance(x, Tensor))
            return out

    with Watch(), SavedBytes(q, k, v) as counter:
        torch.autograd.grad(sliced_attention(q, k, v, rows=4), (q, k, v), g)
    assert counter.bytes == 0
    assert max(made) == q.untyped_storage().nbytes() < 4 * 64 * 48          # less than the scores of a single head


@pytest.mark.parametrize("fused_forward", [False, True])
def test_autocast_around_float32_changes_no_gradient_s_dtype(fused_forward: bool) -> None:
    """torch's kernel answers in bfloat16 there, and so does what comes back."""
    q, k, v, g = inputs(33, 17, torch.float32)
    wanted = torch.autograd.grad(plain(q, k, v, False), (q, k, v), g)
    with torch.autocast("cpu", torch.bfloat16):
        out = sliced_attention(q, k, v, fused_forward=fused_forward)
    for found, exact in zip(torch.autograd.grad(out, (q, k, v), g.to(out.dtype)), wanted):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0, atol=3e-2)         # a handful of bfloat16 roundings, as above


def test_a_slice_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one query row, not 0"):
        sliced_attention(*inputs(3, 3, torch.float32)[:3], rows=0)


def test_a_kernel_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, sliced, fused, mixed; 'slices' is none of them"):
        attend(*inputs(3, 3, torch.float32)[:3], kind="slices")


@pytest.mark.parametrize("kind", ["auto", "sliced", "fused", "mixed"])
def test_every_kernel_looks_back_only_if_it_is_told_to(kind: AttentionKind) -> None:
    q, k, v, g = inputs(13, 13, torch.float64)
    for causal in (False, True):
        ours = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal, kind).unflatten(2, (3, 5)).transpose(1, 2)
        theirs = plain(q, k, v, causal)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)                           # as above
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["sliced", "fused", "mixed"])
def test_of_no_keys_nothing_is_found(kind: AttentionKind) -> None:
    """An empty sum: a context of no tokens adds nothing."""
    q, k, v, _ = (x.transpose(1, 2) for x in inputs(5, 0, torch.float32))
    assert torch.equal(attend(q, k, v, kind=kind), torch.zeros(2, 5, 15))


@pytest.mark.parametrize(("tiles", "rows"), [(True, 1024), (False, 512)])
def test_a_slice_is_larger_where_amx_multiplies(tiles: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.sliced_attention.has_amx", lambda: tiles)
    q = torch.empty(1, 8, 4096, 40, dtype=torch.bfloat16)
    assert slice_size(q, q) == (1, rows)


def test_products_of_bfloat16_have_whole_registers_of_channels() -> None:
    x = torch.ones(2, 5, 40, dtype=torch.bfloat16)
    assert _whole(x).shape == (2, 5, 48)
    assert torch.equal(_whole(x)[..., :40], x)
    assert not _whole(x)[..., 40:].any()
    for other in (x[..., :32], x.float(), x.to("meta")):
        assert _whole(other).shape == other.shape
        assert _whole(other).is_contiguous()


def test_several_heads_a_slice_and_a_smaller_last_one() -> None:
    q, k, v, d_out = inputs(31, 77, torch.float64)
    ours, theirs = _SlicedAttention.apply(q, k, v, False, 2, 10, False), plain(q, k, v, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)                               # float64's rounding
    found, wanted = (torch.autograd.grad(out, (q, k, v), d_out) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "queries"), [(2, 0), (0, 3)])
def test_nothing_looks_at_nothing(heads: int, queries: int) -> None:
    q, k, v = (torch.randn(1, heads, n, 8, requires_grad=True) for n in (queries, 5, 5))
    sliced_attention(q, k, v).sum().backward()
    assert [x.grad.count_nonzero().item() for x in (q, k, v)] == [0, 0, 0]
