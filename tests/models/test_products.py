"""Products by oneDNN: the same sums and gradients as torch's own, asked for where they are the faster ones."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import products
from models.fused_linear import linear_geglu, linear_plus
from models.products import frozen_product, onednn_is_faster, product


@pytest.fixture(autouse=True)
def other_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: False)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (2, 3, 4, 64), (1, 64), (0, 64)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_value_and_gradient(shape: tuple[int, ...], biased: bool, turned: bool) -> None:
    """Of weights that lie the other way round, too, as those of a backward pass."""
    x, weight, bias = numbers(*shape).requires_grad_(), numbers(48, 64, seed=1), numbers(48, seed=2) if biased else None
    weight = weight.T.contiguous().T if turned else weight
    dy = numbers(*shape[:-1], 48, seed=3)
    assert onednn_is_faster(x.detach())
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    (dx,) = torch.autograd.grad(wanted, x, dy.double())
    found = frozen_product(x, weight, bias)
    # 64 products of float32, each rounded by 2^-24 of sums below 40
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    assert torch.equal(product(x.detach(), weight, bias), found)
    torch.testing.assert_close(torch.autograd.grad(found, x, dy)[0], dx, rtol=0, atol=2e-5)


def test_a_product_may_be_changed_in_place() -> None:
    """As a nn.Dropout(inplace=True) after it does."""
    x, weight = numbers(2, 3, 64).requires_grad_(), numbers(48, 64, seed=1)
    frozen_product(x, weight, None).mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, (2 * weight.sum(0)).expand_as(x), rtol=0, atol=2e-5)      # as above


def test_rows_that_do_not_lie_one_after_the_other() -> None:
    x, weight = numbers(3, 6, 5, 64), numbers(48, 64, seed=1)
    for part in (x[:, 1:4], x[1:, :, ::2], x.transpose(1, 2)):
        torch.testing.assert_close(product(part, weight), F.linear(part, weight), rtol=0, atol=2e-5)   # as above


def test_a_bias_that_does_not_lie_in_one_piece() -> None:
    x, weight = numbers(3, 64), numbers(48, 64, seed=1)
    for bias in (numbers(96, seed=2)[::2], numbers(1, seed=2).expand(48)):
        torch.testing.assert_close(product(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=2e-5)   # as above


def test_what_does_not_fit_is_said_by_torch() -> None:
    """oneDNN would say that it could not create a primitive descriptor."""
    x, weight, bias = numbers(3, 64), numbers(48, 64, seed=1), numbers(48, seed=2)
    for wrong in ((x, weight[:, :32]), (x, weight.double()), (x, weight, bias[:32]), (x, weight, bias.double())):
        with pytest.raises(RuntimeError) as torchs:
            F.linear(*wrong)
        with pytest.raises(RuntimeError) as ours:
            product(*wrong)
        assert str(ours.value) == str(torchs.value)
    for usual in ((x, weight, bias[:1]), (x, weight[0]), (x[:, :0], weight[:, :0], bias), (x, weight[:0])):  # to torch
        assert torch.equal(product(*usual), F.linear(*usual))


class Asked(TorchDispatchMode):
    """Keeps the weights that oneDNN is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.weights.append(args[1 if function is torch.ops.mkldnn._linear_pointwise.default else 2])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("weight", [numbers(48, 96)[:, :64], numbers(96, 64)[::2], numbers(64, 96)[:, :48].T])
def test_weights_that_do_not_lie_in_one_piece(weight: Tensor) -> None:
    """oneDNN's product of such takes thousands of times as long, in both dtypes: it is given none."""
    x, bias = numbers(3, 64), numbers(48, seed=2)
    with torch.no_grad(), Asked() as asked:
        found = product(x, weight), linear_plus(numbers(3, 48), x, weight, None), linear_geglu(x, weight, bias)
    assert len(asked.weights) == 4
    assert all(given.is_contiguous() or given.T.is_contiguous() for given in asked.weights)
    whole = weight.contiguous()
    wanted = product(x, whole), linear_plus(numbers(3, 48), x, whole, None), linear_geglu(x, whole, bias)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)                                   # as above


def test_where_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(2, 8)
    assert onednn_is_faster(x)
    assert not any(map(onednn_is_faster, (x.bfloat16(), x.double(), x.to("meta"))))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_is_faster(x)
        assert product(x, numbers(4, 8)).dtype == torch.bfloat16
    with FakeTensorMode():
        assert not onednn_is_faster(torch.empty(2, 8))
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: True)
    assert not onednn_is_faster(x)


def test_of_what_it_is_given_only_the_weight_is_kept() -> None:
    kept: list[Tensor] = []
    x, weight = numbers(5, 8).requires_grad_(), numbers(4, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        frozen_product(x, weight, numbers(4))
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_a_second_derivative_is_an_error() -> None:
    x = numbers(2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(frozen_product(x, numbers(4, 8), None).square().sum(), x, create_graph=True)
