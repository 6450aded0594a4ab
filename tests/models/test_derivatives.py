"""Derivatives of other kinds than a loss's gradient: forward ones, second ones, torch.func's. Right, or an error.

Trained layers are torch's own operations, of which all can be had. torch's attention has them in one kernel only.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import products
from tests.tiny import tiny_classes, tiny_glide, tiny_model

NETWORKS = {"latent": lambda: tiny_model().unet, "glide": lambda: tiny_glide().unet,
            "classes": lambda: tiny_classes().unet}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]().requires_grad_(True)


def function(unet: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Of a noisy image alone; two of these, in float64."""
    config, g = unet.config, torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, config.in_channels, 8, 8, generator=g, dtype=torch.float64)
    context = torch.randn(1, 24, 32, generator=g, dtype=torch.float64) if config.context_dim else None
    pooled = None if config.attention == "transformer" else torch.randn(1, 128, generator=g, dtype=torch.float64)

    def answer(x: Tensor) -> Tensor:
        told = (None if each is None else each.to(x.dtype) for each in (context, pooled))
        with sdpa_kernel(SDPBackend.MATH):
            return unet(x, torch.tensor([500]), *told, attention="fused")

    return answer, x, v


def differences(answer: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-5) -> Tensor:
    """Of the answer along v: wrong by h² and by 1e-16 / h."""
    return (answer(x + h * v) - answer(x - h * v)) / (2 * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_derivatives(
    unet: nn.Module, grad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under no_grad, too, where layers take shortcuts that know of none: they were zero, and nothing was said."""
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: False)        # float32 has them, as on AMD
    unet.double()
    answer, x, v = function(unet)
    with torch.no_grad():
        wanted = differences(answer, x, v)
    unet.to(dtype)
    with torch.set_grad_enabled(grad):
        _, found = torch.func.jvp(answer, (x.to(dtype),), (v.to(dtype),))
    near = 1e-7 if dtype == torch.float64 else 1e-4                                 # the differences, or rounding
    assert (found - wanted).norm() < near * wanted.norm()


def test_second_derivatives(unet: nn.Module) -> None:
    """Of a trained network: of the gradient along v, as a penalty on gradients needs it."""
    answer, x, v = function(unet.double())

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(answer(x).square().sum(), x, create_graph=create_graph)[0]

    wanted = differences(gradient, x, v)
    x.requires_grad_()
    (found,) = torch.autograd.grad((gradient(x, create_graph=True) * v).sum(), x)
    assert (found - wanted).norm() < 1e-7 * wanted.norm()                           # the differences


def test_gradients_by_torch_func(unet: nn.Module) -> None:
    answer, x, v = function(unet.double())
    _, back = torch.func.vjp(answer, x)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad((answer(x) * v[:, :1]).sum(), x)
    (found,) = back((v[:, :1]).expand_as(answer(x)).detach())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)               # in float64


def test_several_gradients_at_once_are_said_to_be_none_of_frozen_layers(unet: nn.Module) -> None:
    """What torch said of them was about a batching rule."""
    answer, x, _ = function(unet.double().requires_grad_(False))

    def some(x: Tensor) -> Tensor:
        return answer(x).flatten()[:2]

    assert torch.autograd.functional.jacobian(some, x).shape == (2, *x.shape)
    with pytest.raises(RuntimeError, match="several gradients at a time, and .* one at a time: leave it out"):
        torch.autograd.functional.jacobian(some, x, vectorize=True)


def test_of_frozen_layers_a_forward_derivative_is_an_error(unet: nn.Module) -> None:
    answer, x, v = function(unet.double().requires_grad_(False))
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="jvp|functorch|forward"):
            torch.func.jvp(answer, (x,), (v,))
