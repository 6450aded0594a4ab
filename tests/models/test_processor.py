"""What is computed by which kernel, on the processors that there are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import processor
from models.attend import best_kind
from models.layers import Linear, Pointwise, linear

INTEL = {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True, "amx_tile": True}
OTHER = {"cpu_name": "AMD EPYC", "avx512_bf16": True}
ARM = {"cpu_name": "Neoverse-V2", "bf16": True}


@pytest.fixture(params=[INTEL, OTHER, ARM, {}], ids=["intel", "other", "arm", "unknown"])
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(processor, "capabilities", lambda: request.param)
    return request.param


def test_bfloat16(said: dict) -> None:
    assert processor.cpu_has_bfloat16() == (said != {})
    assert processor.products_have_bfloat16() == (said in (INTEL, OTHER))


def test_the_kernel_of_attention(said: dict) -> None:
    q = torch.zeros(1, 1, 1, 1)
    assert best_kind(q) == "fused"
    assert best_kind(q.bfloat16()) == ("mixed" if said is INTEL else "sliced")
    assert best_kind(q.bfloat16().to("meta")) == "fused"


def test_a_linear_layer_is_the_same_sum_either_way(said: dict) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((2, 5, 8), (6, 8), (6,)))
    x.requires_grad_()
    wanted, ours = F.linear(x, weight, bias), linear(x, weight, bias)
    assert ("_Product" in str(_functions(ours))) == (said is OTHER)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)        # eight products of about 1 in float32
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)          # six products of about 6


@pytest.mark.parametrize("make", [lambda: Linear(8, 6), lambda: Pointwise(8, 6, 1)])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_layer_that_learns_is_torchs(make: Callable[[], nn.Module], trained: str, said: dict) -> None:
    layer, x = make().requires_grad_(False), torch.ones(2, 5, 8, requires_grad=True)
    getattr(layer, trained).requires_grad_()
    assert "_Product" not in str(_functions(layer(x)))
    assert torch.autograd.grad(layer(x).sum(), getattr(layer, trained))[0].unique().tolist() == [10.0]


def test_a_linear_layer_of_no_tokens(said: dict) -> None:
    assert linear(torch.ones(0, 5, 8), torch.ones(6, 8), torch.ones(6)).shape == (0, 5, 6)


def _functions(y: torch.Tensor) -> list:
    """The names of the operations of a tensor's graph."""
    found, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        found.append(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def test_this_processor_answers() -> None:
    asked = (
        processor.cpu_has_bfloat16, processor.has_amx, processor.products_have_bfloat16,
        processor.matrix_products_are_fast,
    )  # fmt: skip
    assert all(isinstance(ask(), bool) for ask in asked)
