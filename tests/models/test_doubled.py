"""The convolution of a doubled map that is never made: the same sums."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import doubled
from models.layers import Upsample, twice
from models.unet import ResBlock

original = doubled.doubled_conv


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the root mean squares."""
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("band_rows", [1, 2, 5, 10])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 1)])
def test_value_and_gradient(
    band_rows: int, channels: int, size: tuple[int, int], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rows, images and channels of the answer are made at a time, and however map and weight lie."""
    monkeypatch.setattr(doubled, "SOME", channels * 6 * 9)
    monkeypatch.setattr(doubled, "BAND_BYTES", band_rows * size[1] * 9 * channels * 8)
    x, weight, bias = numbers(2, 6, *size).requires_grad_(), numbers(4, 6, 3, 3, seed=1), numbers(4, seed=2)
    if last:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    wanted = F.conv2d(twice(x), weight, bias, padding=1)
    dy = numbers(*wanted.shape, seed=3)
    (dx,) = torch.autograd.grad(wanted, x, dy)
    y = doubled.doubled_conv(x, weight, bias)
    # sums of up to 144 products in float64, whose rounding is 2e-16
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dx, rtol=0, atol=1e-13)


def test_what_is_large_enough_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(64, 8, 3, 3)
    assert doubled.is_worth_it(x, weight)
    for other in (x[:, :, :1, :2], x.to("meta")):
        assert not doubled.is_worth_it(other, weight.to(other.device))
    for tiles in (True, False):
        monkeypatch.setattr(doubled, "has_amx", lambda tiles=tiles: tiles)
        assert doubled.is_worth_it(x.bfloat16(), weight.bfloat16()) != tiles


def test_in_bfloat16_it_rounds_twice_or_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and their sum: √2 of a convolution's error. Back thrice, what goes into the products of each part of the
    weight, what comes out and the sum: √3. (Added in bfloat16 it was 2.4 and 2.1.)
    """
    monkeypatch.setattr(doubled, "SOME", 64 * 9 * 13)
    x, weight, bias = (numbers(*s, seed=i).bfloat16() for i, s in enumerate([(1, 64, 16, 16), (64, 64, 3, 3), (64,)]))
    exact = F.conv2d(twice(x.double().requires_grad_()), weight.double(), bias.double(), padding=1)
    y = doubled.doubled_conv(x.requires_grad_(), weight, bias)
    assert error(y, exact) < 1.5 * error(exact.bfloat16(), exact)
    dy = numbers(*exact.shape, seed=3).bfloat16()
    whole = F.conv_transpose2d(dy.double(), weight.double(), padding=1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    dx = whole.sum((3, 5))
    (found,) = torch.autograd.grad(y, x, dy)
    assert error(found, dx) < 1.8 * error(dx.bfloat16(), dx)


def test_under_autocast_a_map_of_bfloat16_has_its_gradient_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of float32 are cast going forward; going back nothing casts them."""
    monkeypatch.setattr(doubled, "has_amx", lambda: False)
    conv = Upsample(4).requires_grad_(False)
    x, dy = numbers(1, 4, 8, 8).bfloat16().requires_grad_(), numbers(1, 4, 16, 16, seed=1).bfloat16()
    assert doubled.is_worth_it(x, conv.conv.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = conv(x), F.conv2d(twice(x), conv.conv.weight, conv.conv.bias, padding=1)
    torch.testing.assert_close(y, wanted, rtol=2**-7, atol=2e-2)          # sums of 36 products below 1
    found = [torch.autograd.grad(each, x, dy)[0] for each in (y, wanted)]
    torch.testing.assert_close(*found, rtol=2**-6, atol=5e-2)             # four such sums


@pytest.mark.parametrize("grad", [False, True])
def test_layers_that_double_take_this_way_if_frozen(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upsample, and the residual block that resamples; with weights that learn autograd's own way gives the same."""
    torch.manual_seed(0)
    upsample, block = Upsample(8).double(), ResBlock(8, 8, 4, 2, resample=twice).double()
    x, cond = numbers(1, 8, 6, 6), type("Cond", (), {"emb": numbers(1, 4), "run": lambda self, a, b, f, *x: f(*x)})()
    calls = []
    monkeypatch.setattr(doubled, "doubled_conv", lambda *args: calls.append(args) or original(*args))
    for layer in (upsample, block):
        torch.nn.init.normal_(next(layer.parameters()))
        wanted = layer(x, cond)
        assert not calls
        with torch.set_grad_enabled(grad):
            found = layer.requires_grad_(False)(x, cond)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)        # float64 sums of 72 products
        assert len(calls) == 1
        calls.clear()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")       # torch.compile's own
def test_compiled_it_is_the_same() -> None:
    torch.manual_seed(0)
    upsample, x = Upsample(8).double().requires_grad_(False), numbers(2, 8, 6, 5)
    found = torch.compile(upsample, backend="aot_eager")(x)
    torch.testing.assert_close(found, upsample(x), rtol=0, atol=1e-13)        # float64 sums of 72 products below 1


def test_products_of_a_band_take_no_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubled, "BAND_BYTES", 8 * 7 * 36 * 5)
    made, product = [], doubled.product
    monkeypatch.setattr(doubled, "product", lambda *args: made.append(product(*args)) or made[-1])
    doubled.doubled_conv(numbers(2, 6, 5, 7), numbers(4, 6, 3, 3), numbers(4))
    assert [len(products) for products in made] == [1, 1]                 # an image fits, two do not
    doubled.doubled_conv(numbers(2, 6, 2, 7), numbers(4, 6, 3, 3), numbers(4))
    assert [len(products) for products in made[2:]] == [2]


def test_kernels_come_into_order_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubled, "SOME", 6 * 9 * 3 + 1)
    made, product = [], doubled.product
    monkeypatch.setattr(doubled, "product", lambda x, taps: made.append(len(taps)) or product(x, taps))
    doubled.doubled_conv(numbers(1, 6, 2, 2), numbers(7, 6, 3, 3), numbers(7))
    assert made == [27, 27, 9]


def test_no_images() -> None:
    assert doubled.doubled_conv(numbers(0, 6, 2, 2), numbers(4, 6, 3, 3), numbers(4)).shape == (0, 4, 4, 4)
