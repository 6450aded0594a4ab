"""Operations with frozen weights: the value and the gradients that autograd has, from less than it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._saved_bytes import SavedBytes
from models.doubled import doubled_conv
from models.frozen import conv2d, geglu
from models.group_norm import frozen_group_norm, normalised, statistics


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_map(*shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def assert_equal(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradients, in float64, whose roundings are 2e-16; each number is a sum of up to a few hundred."""
    y, wanted = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    dy = numbers(*y.shape, seed=9)
    sources = [x for x in inputs if x.requires_grad]
    for a, b in zip(torch.autograd.grad(y, sources, dy), torch.autograd.grad(wanted, sources, dy)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 6), (8, 8), (1, 1)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0)])
def test_convolution(size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    if min(size) + 2 * padding < kernel:
        return
    weight, bias, x = numbers(5, 4, kernel, kernel), numbers(5, seed=1), numbers(2, 4, *size, seed=2).requires_grad_()
    stride, padding = (stride, stride), (padding, padding)
    for b in (bias, None):
        ours, theirs = ((lambda x, f=f, b=b: f(x, weight, b, stride, padding)) for f in (conv2d, F.conv2d))
        assert_equal(ours, theirs, x)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("make", [a_map, numbers])
def test_group_norm(silu: bool, modulated: bool, make: Callable[..., Tensor]) -> None:
    weight, bias, x = numbers(8), numbers(8, seed=1), make(3, 8, 5, 6, seed=2).requires_grad_()
    more = [numbers(3, 8, 1, 1, seed=s).requires_grad_() for s in (3, 4)] if modulated else []

    def ours(x: Tensor, *more: Tensor) -> Tensor:
        return frozen_group_norm(x, weight, bias, 4, 1e-3, silu, *more)

    def theirs(x: Tensor, *more: Tensor) -> Tensor:
        y = F.group_norm(x, 4, weight, bias, 1e-3)
        y = y * (1 + more[0]) + more[1] if more else y
        return F.silu(y) if silu else y

    assert_equal(ours, theirs, x, *more)
    if modulated:
        assert_equal(ours, theirs, x.detach(), *more)                      # x is noise, the text modulates it


def test_geglu() -> None:
    def theirs(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    assert_equal(geglu, theirs, numbers(2, 3, 8).requires_grad_())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: conv2d(x, numbers(4, 4, 3, 3), None),
        geglu,
        lambda x: frozen_group_norm(x, numbers(4), numbers(4, seed=1), 2, 1e-5, True),
        lambda x: doubled_conv(x, numbers(4, 4, 3, 3), numbers(4)),
    ],
    ids=["convolution", "geglu", "group norm", "doubled"],
)
@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_is_an_error(operation: Callable[[Tensor], Tensor], power: int) -> None:
    """Not the rest of it, here that of x³, as if the operation had none."""
    x = numbers(2, 4, 6, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hvp(lambda x: operation(x).pow(power).sum() + x.pow(3).sum(), x, torch.ones_like(x))


def test_a_mean_far_from_zero_does_not_drown_the_variance() -> None:
    """torch's kernel for channels-last maps leaves 1e-2 here."""
    x = (100 + numbers(2, 64, 16, 16)).float().contiguous(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 32)
    y, mean, rstd = normalised(x, torch.ones(64), torch.zeros(64), 32, 1e-5, *statistics(x, 32))
    # float32 knows 100 to 4e-6, and a deviation of 1 inherits the roundings of x, of the mean and of their products
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)
    groups = x.double().unflatten(1, (32, 2)).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(dim=2), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (groups.var(dim=2, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)


def test_bfloat16_is_rounded_once() -> None:
    x = a_map(2, 64, 8, 8).bfloat16()
    exact = F.group_norm(x.double(), 32)
    y = frozen_group_norm(x, torch.ones(64).bfloat16(), torch.zeros(64).bfloat16(), 32, 1e-5)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-8, atol=1e-5)     # to the neighbour at most


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_in_bfloat16_is_rounded_as_its_value_is(layout: torch.memory_format) -> None:
    x, dy = (numbers(2, 64, 8, 8, seed=seed).bfloat16().contiguous(memory_format=layout) for seed in (0, 1))
    weight, bias = numbers(64, seed=2).bfloat16(), numbers(64, seed=3).bfloat16()
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    y = F.group_norm(exact, 32, weight.double(), bias.double(), 1e-5)
    (wanted,) = torch.autograd.grad(y, exact, dy.double())
    (found,) = torch.autograd.grad(frozen_group_norm(x, weight, bias, 32, 1e-5), x, dy)
    # its rounding is 2^-9 at the most, 0.58 of that on average; torch's kernel reads what was rounded to bfloat16, too
    assert (found - wanted).norm() < 2**-8 * wanted.norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out", [1, 8])
def test_a_convolution_under_autocast_has_its_gradient_outside_of_it(out: int, stride: int) -> None:
    x, weight = numbers(2, 8, 6, 6).float().requires_grad_(), numbers(out, 8, 3, 3, seed=1).float()
    found, wanted = (_outside(f, x, weight, None, (stride, stride), (1, 1)) for f in (conv2d, F.conv2d))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2e-2)      # bfloat16, sums of up to 72 products of 1


def _outside(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, *rest)
    return torch.autograd.grad(y, x, numbers(*y.shape, seed=2).to(y.dtype))[0]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of torch has no autocast for GPUs")
def test_on_a_gpu_it_stays_in_its_dtype_under_autocast() -> None:
    """As its backward pass needs it; torch's own group norm would answer in float32."""
    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(n, device="cuda", dtype=torch.float16) for n in ((1, 8, 4, 4), 8))
        torch.set_autocast_enabled("cuda", True)
        try:
            assert frozen_group_norm(x, weight, weight, 4, 1e-5).dtype == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", False)


class SeenContiguous(TorchDispatchMode):
    """Fails where a group norm's kernel would be given maps that it reads as if they were contiguous."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "group_norm" in str(func):
            self.calls += 1
            maps = [each for each in args if isinstance(each, Tensor) and each.ndim == 4]
            assert maps
            assert all(each.is_contiguous() for each in maps)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strided", [True, False])
def test_off_the_cpu_its_kernels_get_contiguous_maps(strided: bool) -> None:
    """torch before 2.14 does not see to that itself, and refuses the forward pass or computes wrong gradients."""
    x, weight = torch.empty(2, 16, 4, 4, device="meta"), torch.empty(8, device="meta")
    x = (x[:, ::2] if strided else x[:, :8].contiguous()).requires_grad_()
    with SeenContiguous() as seen:
        y = frozen_group_norm(x, weight, weight, 4, 1e-5, True)
        dy = torch.empty_like(y).contiguous(memory_format=torch.channels_last)
        torch.autograd.grad(y, x, dy)
    assert seen.calls == 3                                                 # of which one is the second forward run


class TestKept:
    """Bytes between the forward and the backward pass, the weights aside."""

    x = a_map(1, 64, 16, 16)                                               # 131072 bytes

    def test_nothing_by_a_convolution(self) -> None:
        weight, x = numbers(64, 64, 3, 3), self.x.clone().requires_grad_()
        with SavedBytes(weight) as ours:
            conv2d(x, weight, None, (1, 1), (1, 1))
        with SavedBytes(weight) as theirs:
            F.conv2d(x, weight, None, 1, 1)
        assert (ours.bytes, theirs.bytes) == (0, x.nbytes)

    def test_one_input_by_norm_modulation_and_silu(self) -> None:
        weight, bias, x = numbers(64), numbers(64), self.x.clone().requires_grad_()
        scale, shift = (numbers(1, 64, 1, 1, seed=s).requires_grad_() for s in (0, 1))
        with SavedBytes(weight, bias) as counter:
            frozen_group_norm(x, weight, bias, 32, 1e-5, True, scale, shift)
        statistics = 0 if x.is_contiguous() else 2 * 64 * x.element_size()                     # of one sample
        assert counter.bytes == x.nbytes + scale.nbytes + shift.nbytes + statistics

    def test_the_projection_by_geglu(self) -> None:
        x = numbers(1, 10, 64).requires_grad_()
        with SavedBytes() as counter:
            geglu(x)
        assert counter.bytes == x.nbytes


@pytest.mark.parametrize(("kernel", "padding"), [(1, 1), (3, 3)])
def test_a_convolution_to_few_channels_that_is_padded_beyond_its_kernel(kernel: int, padding: int) -> None:
    x, weight = numbers(1, 16, 6, 6).requires_grad_(), numbers(2, 16, kernel, kernel, seed=1)
    pads = (padding, padding)
    assert_equal(lambda x: conv2d(x, weight, None, (1, 1), pads), lambda x: F.conv2d(x, weight, None, 1, padding), x)
