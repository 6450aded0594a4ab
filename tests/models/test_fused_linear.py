"""Linear layers with what follows them, against the same in float64: nearer to it than one operation after another."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models import fused_linear, products
from models.checkpointing import checkpoint
from models.condition import Condition
from models.fused_linear import is_worth_it, linear_geglu, linear_plus
from models.layers import Conv2d, Linear, plus_conv, plus_linear
from models.unet import ResBlock

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor multiplies in float32 alone"
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the root mean squares."""
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def layer(c_in: int, c_out: int) -> tuple[Tensor, Tensor]:
    return numbers(c_out, c_in, seed=1) / 8, numbers(c_out, seed=2)


def roundings(found: Tensor, exact: Tensor) -> float:
    """How many roundings to bfloat16 explain the error: those of independent ones add in their squares."""
    return (error(found, exact) / error(exact.bfloat16(), exact)) ** 2


@pytest.mark.parametrize("tokens", [(2, 96), (1, 5)])
def test_a_layer_and_its_addition_are_rounded_once(tokens: tuple[int, int]) -> None:
    x, h, (weight, bias) = numbers(*tokens, 64), numbers(*tokens, 48, seed=3), layer(64, 48)
    exact = h.double() + F.linear(x.double(), weight.double(), bias.double())
    # one, and sums in float32 add a thousandth; one operation after another was found at 1.8
    assert roundings(linear_plus(h, x, weight, bias), exact) < 1.2
    assert roundings(linear_plus(h, x, weight, None), exact - bias.double()) < 1.2
    assert roundings(F.linear(x, weight, bias) + h, exact) > 1.4


def test_geglu() -> None:
    x, (weight, bias) = numbers(2, 96, 64), layer(64, 160)
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    found = linear_geglu(x, weight, bias)
    assert found.shape == (2, 96, 80)
    assert roundings(found, value * F.gelu(gate)) < 2.2      # the gate's, and its own; 4.2 one by one


def test_in_float32_both_are_the_same_sums() -> None:
    x, h, (weight, bias) = numbers(2, 96, 64).float(), numbers(2, 96, 80, seed=3).float(), layer(64, 160)
    weight, bias = weight.float(), bias.float()
    exact = F.linear(x.double(), weight.double(), bias.double())
    value, gate = exact.chunk(2, dim=-1)
    # 64 products of float32, each rounded by 2^-24 of numbers below 10
    torch.testing.assert_close(linear_plus(h, x, weight[:80], bias[:80]).double(), h + value, rtol=0, atol=1e-5)
    torch.testing.assert_close(linear_geglu(x, weight, bias).double(), value * F.gelu(gate), rtol=1e-5, atol=1e-5)


def test_a_bias_that_does_not_lie_in_one_piece() -> None:
    x, h, (weight, bias) = numbers(2, 96, 64), numbers(2, 96, 80, seed=3), layer(64, 160)
    apart = bias.repeat_interleave(2)[::2]
    assert torch.equal(linear_geglu(x, weight, apart), linear_geglu(x, weight, bias))
    assert torch.equal(linear_plus(h, x, weight[:80], apart[:80]), linear_plus(h, x, weight[:80], bias[:80]))


def test_what_does_not_fit_is_torch_s_to_say_or_to_spread() -> None:
    x, h, (weight, bias) = numbers(2, 96, 64), numbers(80, seed=3), layer(64, 80)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(192x63 and 64x80\)"):
        linear_plus(h.expand(2, 96, 80), x[..., :63], weight, bias)
    with pytest.raises(RuntimeError, match="must match the size"):
        linear_plus(numbers(96, 2, 80), x, weight, bias)                # as many numbers, of other places
    assert torch.equal(linear_plus(h, x, weight, bias), h + F.linear(x, weight, bias))


def test_the_gate_s_gelu_is_the_exact_one() -> None:
    """Of -3 it is -3 Φ(-3) = -0.00405, where the approximation by tanh has -0.00364."""
    bias = torch.tensor([1.0] * 16 + [-3.0] * 16).bfloat16()
    found = linear_geglu(numbers(1, 4, 16), torch.zeros(32, 16).bfloat16(), bias)
    wanted = torch.full((1, 4, 16), -1.5 * math.erfc(3 / math.sqrt(2)), dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=0)                     # two roundings of 2^-9


def test_only_where_no_gradient_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "products_have_bfloat16", lambda: True)
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: True)
    x = numbers(1, 4, 8)
    assert not is_worth_it(x)
    with torch.no_grad():
        assert is_worth_it(x)
        assert not is_worth_it(x.float())
        monkeypatch.setattr(products, "matrix_products_are_fast", lambda: False)
        assert is_worth_it(x.float())
        assert not is_worth_it(x.double())
        assert not is_worth_it(x.to("meta"))
        with FakeTensorMode():
            assert not is_worth_it(torch.empty(1, 4, 8, dtype=torch.bfloat16))     # for which it has no kernel
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_worth_it(x)                                              # whose weight may be float32
    seen = []
    y = checkpoint(lambda x: (seen.append(is_worth_it(x)), 2 * x)[1], x.requires_grad_())
    y.sum().backward()
    assert seen == [False, False]                                                              # both runs
    with torch.no_grad():
        assert is_worth_it(x)


@torch.no_grad()
def test_layers_take_this_way_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "linear_plus", lambda h, x, weight, bias: "fused")
    project, x, h = Linear(8, 4).bfloat16(), numbers(1, 3, 8), numbers(1, 3, 4)
    for pays in (True, False):
        monkeypatch.setattr(fused_linear, "products_have_bfloat16", lambda pays=pays: pays)
        assert isinstance(plus_linear(h, project, x), str) == pays


@torch.no_grad()
def test_a_pointwise_convolution_and_its_addition_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "products_have_bfloat16", lambda: True)
    conv, x, h = Conv2d(64, 48, 1).bfloat16(), numbers(2, 64, 8, 12), numbers(2, 48, 8, 12, seed=3)
    weight, bias = layer(64, 48)
    conv.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    exact = h.double() + F.conv2d(x.double(), conv.weight.double(), conv.bias.double())
    last = [y.contiguous(memory_format=torch.channels_last) for y in (h, x)]
    assert roundings(plus_conv(last[0], conv, last[1]), exact) < 1.2
    assert roundings(plus_conv(h.clone(), conv, x), exact) > 1.4            # of maps that lie a channel at a time: two


@torch.no_grad()
def test_shortcuts_of_residual_blocks_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "products_have_bfloat16", lambda: True)
    calls, plain = [], fused_linear.linear_plus
    monkeypatch.setattr(fused_linear, "linear_plus", lambda *args: calls.append(args) or plain(*args))
    x = numbers(2, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    ResBlock(64, 32, 8, 8).bfloat16().requires_grad_(False)(x, Condition(numbers(1, 8), None))
    assert len(calls) == 1


@torch.no_grad()
def test_a_plan_goes_through_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "products_have_bfloat16", lambda: True)
    block = ResBlock(64, 32, 8, 8).bfloat16().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 64, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        assert block(x, Condition(torch.empty(1, 8, dtype=torch.bfloat16), None)).shape == (2, 32, 64, 64)
