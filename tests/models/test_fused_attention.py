"""torch's fused attention with keys added and masked out, against the plain formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attend import AttentionKind, attend
from models.fused_attention import fused_attention


def inputs(rows: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(keys)
    sizes = [(2, n, 3, 8) for n in (rows, keys, keys, rows)]           # the heads of a token side by side
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for s in sizes]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 77])
def test_equals_the_plain_formula(keys: int) -> None:
    q, k, v, g = inputs(160, keys, torch.float64)
    ours, theirs = fused_attention(q, k, v), plain(q, k, v)
    # 1e-13: a few hundred float64 roundings (2e-16) of numbers of order one
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_keys_that_were_added_weigh_nothing(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, _ = (x.detach() for x in inputs(160, 77, dtype))
    q, k = q.abs(), k - 30                                  # scores from -150 to -20, which zeros would outweigh
    exact = plain(q.double(), k.double(), v.double())
    # scores of 150 are rounded to 1.5e-5, exponentials by as much of themselves; in bfloat16 weights and values by 4e-3
    torch.testing.assert_close(fused_attention(q, k, v).double(), exact, rtol=0, atol=tolerance)


def keys_seen(*args: Any, run: Callable[..., Tensor] = fused_attention, **more: Any) -> list[int]:
    """Of how many keys torch's fused kernel was told by run(*args)."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                seen.append(args[1].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch():
        run(*args, **more)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_is_given_multiples_of_sixteen(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(160, 77, dtype)
    assert keys_seen(q, k, v) == [80]
    assert keys_seen(q, k[:, :, :72], v[:, :, :72]) == [80]
    assert keys_seen(q, k[:, :, :64], v[:, :, :64]) == [64]
    assert keys_seen(q[:, :, :77], k, v, causal=True) == [77]
    assert keys_seen(q[:, :, :99], k, v) == [77]                            # so few that the copies would cost more


@pytest.mark.parametrize("kind", ["fused", "mixed"])
def test_attention_is_given_them(kind: AttentionKind) -> None:
    q, k, v, _ = (x.detach().transpose(1, 2) for x in inputs(160, 77, torch.float32))
    assert keys_seen(q, k, v, run=lambda *qkv: attend(*qkv, kind=kind)) == [80]
