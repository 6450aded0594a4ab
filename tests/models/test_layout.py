"""Layouts in memory, which a map of one image must not lose."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.frozen import conv2d
from models.group_norm import frozen_group_norm
from models.layers import plus
from models.layout import LARGE, PART, channels_last, converted, copy_into, laid_out


def strides(x: Tensor) -> tuple[int, ...]:
    _, channels, height, width = x.shape
    return channels * height * width, 1, channels * width, channels


def odd(x: Tensor) -> Tensor:
    """Of one image, channels-last, as a linear layer of its pixels leaves it: the batch's stride is a pixel's."""
    return channels_last(x).as_strided(x.shape, (x.shape[1], *strides(x)[1:]))


def test_channels_last_is_recognised_and_the_same_memory() -> None:
    x = odd(torch.randn(1, 8, 5, 7))
    assert x.is_contiguous(memory_format=torch.channels_last)                                  # in torch's words it is
    assert x.stride() != strides(x)
    y = channels_last(x)
    assert y.stride() == strides(x)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)
    assert channels_last(y) is y


def test_large_maps_are_channels_last_and_small_ones_are_not() -> None:
    x = torch.randn(1, LARGE // 64, 8, 8)
    assert laid_out(x).stride() == strides(x)
    assert laid_out(channels_last(x)[:, :-1]).is_contiguous()


@pytest.mark.parametrize("function", [
    lambda x: conv2d(x, torch.ones(256, 256, 3, 3), None, (1, 1), (1, 1)),
    lambda x: frozen_group_norm(x, torch.ones(256), torch.zeros(256), 32, 1e-5, True),
])
def test_no_kernel_copies_a_map_for_an_odd_stride_of_the_batch(function: object) -> None:
    x, dy = odd(torch.randn(1, 256, 32, 32)).requires_grad_(), odd(torch.randn(1, 256, 32, 32))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        torch.autograd.grad(function(x), x, dy)
    assert not [event for event in seen.events() if event.name == "aten::copy_" and [*x.shape] in event.input_shapes]


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (7, 1, 3, 3), (5, 8, 1, 1), (2 * PART // (9 * 64) + 3, 64, 3, 3)])
@pytest.mark.parametrize(
    ("read", "wanted"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_a_kernel_that_is_converted_on_a_cpu_comes_to_lie_channels_last(
    shape: tuple[int, ...], read: torch.dtype, wanted: torch.dtype
) -> None:
    weight = torch.randn(shape).to(read)
    found = converted(weight, torch.device("cpu"), wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == wanted
    assert torch.equal(found, weight.to(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_loses_no_digit_that_fits(dtype: torch.dtype) -> None:
    source = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    kernel = torch.empty(6, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    copy_into(kernel, source)
    assert torch.equal(kernel, source.to(dtype))


def test_what_is_no_kernel_or_is_not_converted_keeps_its_layout() -> None:
    weight, cpu = torch.randn(6, 4, 3, 3), torch.device("cpu")
    assert converted(weight, cpu, torch.float32) is weight                                     # the file's own memory
    for other in (torch.device("meta"), cpu):
        y = converted(weight if other.type == "meta" else weight.flatten(1), other, torch.bfloat16)
        assert y.is_contiguous()


def test_a_branch_that_is_a_view_is_not_written_while_autograd_records() -> None:
    weight, x = torch.randn(4, 3), torch.randn(2, 5, 3, requires_grad=True)
    branch = F.linear(x, weight, torch.zeros(4))
    y = plus(branch, torch.ones(4))
    assert torch.equal(y, branch + 1)
    with torch.no_grad():
        branch = F.linear(x, weight)
        assert plus(branch, torch.ones(4)).data_ptr() == branch.data_ptr()


def test_kernels_of_eight_bits_are_laid_too() -> None:
    kernel = torch.randn(4, 8, 3, 3).to(torch.float8_e4m3fn)
    found = converted(kernel, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(found, kernel.to(torch.bfloat16))
    assert found.is_contiguous(memory_format=torch.channels_last)
