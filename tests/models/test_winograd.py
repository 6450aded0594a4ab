"""Winograd's convolutions: the same sums from a quarter of the products, and what is rounded then."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import winograd
from models.frozen import conv2d
from models.winograd import CHANNELS, convolved, gradient, is_worth_it, matrices


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def error(got: Tensor, wanted: Tensor) -> float:
    """Of the deviation of what is wanted."""
    return ((got - wanted).std() / wanted.std()).item()


@pytest.mark.parametrize("room", [1, 700, winograd.ROOM])          # a row of tiles and a channel at a time; some; all
@pytest.mark.parametrize("size", [(4, 8), (12, 20)])
@pytest.mark.parametrize("lay_out", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("lay_kernel", [Tensor.contiguous, channels_last])
def test_value_and_gradient(
    room: int, size: tuple[int, int], lay_out: object, lay_kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "ROOM", room)
    monkeypatch.setattr(winograd, "ROOM_OF_KERNELS", room)
    x, weight, bias = numbers(3, 16, *size), numbers(24, 16, 3, 3, seed=1) / 12, numbers(24, seed=2)
    x, weight, dy = lay_out(x), lay_kernel(weight), lay_out(numbers(3, 24, *size, seed=3))
    exact = x.double().requires_grad_()
    wanted = F.conv2d(exact, weight.double(), bias.double(), padding=1)
    (dx,) = torch.autograd.grad(wanted, exact, dy.double())
    # 36 products of numbers of 1 in float32, weighted by up to 40 and summed twice; measured: 6e-6 at most
    torch.testing.assert_close(convolved(x, weight, bias).double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(convolved(x, weight, None).double(), wanted - bias[:, None, None], rtol=0, atol=2e-5)
    torch.testing.assert_close(gradient(dy, weight).double(), dx, rtol=0, atol=2e-5)


def test_of_rows_that_are_there_nothing_is_padded() -> None:
    x, weight, bias = numbers(2, 16, 10, 12), numbers(24, 16, 3, 3, seed=1) / 12, numbers(24, seed=2)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=(0, 1))
    torch.testing.assert_close(convolved(x, weight, bias, edges=0).double(), wanted, rtol=0, atol=2e-5)    # as above


def test_what_is_rounded() -> None:
    """Of sums of 2,880 products; the customary points 0, ±1, ±2 give 3.6e-6."""
    x, weight = numbers(1, 320, 32, 32), numbers(32, 320, 3, 3, seed=1) / 53
    assert error(convolved(x, weight, None), F.conv2d(x.double(), weight.double(), padding=1)) < 2e-6    # 1.6e-6


def test_the_matrices_make_a_convolution() -> None:
    """In float64 along one axis, of each kernel and each input that has a single one: exact but for rounding."""
    BT, G, AT = (torch.tensor(M, dtype=torch.float64) for M in matrices())
    for tap in range(9):
        g = G[:, tap]
        response = AT @ (g[:, None] * BT)                          # (16 pixels of the answer, 36 of the input)
        wanted = torch.zeros(4, 4, 6, 6, dtype=torch.float64)
        for i in range(4):
            for j in range(4):
                wanted[i, j, i + tap // 3, j + tap % 3] = 1
        # numbers of up to 40, rounded to 2^-53 each
        torch.testing.assert_close(response.view(4, 4, 6, 6), wanted, rtol=0, atol=1e-13)


def test_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(
        channels: int = CHANNELS, out: int = CHANNELS, side: int = 32, batch: int = 1, kernel: int = 3,
        stride: int = 1, padding: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu",
    ) -> bool:  # fmt: skip
        x = torch.zeros(batch, channels, side, side, dtype=dtype, device=device)
        weight = torch.zeros(out, channels, kernel, kernel, dtype=dtype, device=device)
        return is_worth_it(x, weight, (stride, stride), (padding, padding))

    assert all([asked(), asked(side=16, batch=2), asked(out=256)])
    assert not any([asked(side=16), asked(channels=4), asked(out=4), asked(side=30)])
    assert not any([asked(stride=2), asked(padding=0), asked(kernel=5), asked(kernel=5, padding=2)])
    assert not any([asked(dtype=torch.float64), asked(dtype=torch.bfloat16), asked(device="meta")])
    with torch.autocast("cpu", torch.bfloat16):
        assert not asked()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not asked()


def test_a_frozen_convolution_takes_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = numbers(1, 128, 32, 32).requires_grad_(), numbers(128, seed=2)
    weight = numbers(128, 128, 3, 3, seed=1) / 34
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    dy = numbers(*wanted.shape, seed=3)
    (dx,) = torch.autograd.grad(wanted, x, dy.double())
    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, None)
    y = conv2d(x, weight, bias, (1, 1), (1, 1))
    assert error(y, wanted) < 2e-6                                                             # as above
    assert error(torch.autograd.grad(y, x, dy)[0], dx) < 2e-6


def test_what_does_not_fit_is_left_to_torch() -> None:
    """Whose errors name the shapes."""
    weight = torch.zeros(128, 128, 3, 3)
    with pytest.raises(RuntimeError, match="to have 128 channels, but got 64"):
        conv2d(torch.zeros(1, 64, 32, 32), weight, None, (1, 1), (1, 1))
    assert not is_worth_it(torch.zeros(1, 128, 32, 32), weight.bfloat16(), (1, 1), (1, 1))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what all the tiles and kernels at their points would take: nothing but the answer is larger than a part."""
    monkeypatch.setattr(winograd, "ROOM", 700)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: object, arguments: tuple = (), named: dict | None = None) -> Any:
            out = function(*arguments, **(named or {}))
            sizes.append(out.untyped_storage().nbytes() // 4 if isinstance(out, Tensor) else 0)
            return out

    x, weight = numbers(3, 16, 12, 20), numbers(40, 16, 3, 3)
    with Sizes():
        y = convolved(x, weight, None)
    assert max(size for size in sizes if size not in (x.numel(), y.numel(), weight.numel())) <= 36 * 700


def test_what_it_returns_can_be_added_to_in_place() -> None:
    x, weight = numbers(2, 128, 32, 32).requires_grad_(), numbers(128, 128, 3, 3, seed=1) / 34
    y = conv2d(x, weight, None, (1, 1), (1, 1))
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y.add_(x).sum(), x)[0], dx + 1)


def test_a_plan_comes_first() -> None:
    """On fake tensors; what is remembered from there must not be fake."""
    matrices.cache_clear()
    with FakeTensorMode():
        convolved(torch.zeros(1, 16, 8, 8), torch.zeros(16, 16, 3, 3), None)
    assert convolved(torch.zeros(1, 16, 8, 8), torch.zeros(16, 16, 3, 3), torch.ones(16)).eq(1).all()


@pytest.mark.parametrize(("room", "places"), [("ROOM", 32 * 24), ("ROOM_OF_KERNELS", 8 * 24)])  # 32 tiles, 8 channels
def test_answers_are_made_by_whole_registers_of_channels(
    room: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, room, places)
    made, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out: made.append(out.shape) or bmm(a, b, out=out))
    winograd.convolved(torch.zeros(2, 8, 16, 16), torch.zeros(40, 8, 3, 3), None)
    assert [n for points, tiles, n in made if (points, tiles) == (36, 32)] == [16, 16, 8]
