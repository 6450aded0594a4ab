"""What lives in memory while something runs, and how much it computes: on real tensors, and on fake ones.

Every operation passes through a dispatch mode. Storages that come out of one and were not there before are added to
what lives, and a weak reference subtracts them when they die; so views, in-place changes, and whatever autograd keeps
or lets go are followed without knowing anything of the networks. Sizes are all that is read.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveMemory(TorchDispatchMode):
    """Within the block, and over several of them: `live` and `peak` bytes of tensors on a device, and `flops`.

    device: "cpu", "cuda" or "meta"; what lies elsewhere is not counted. workspace: of an operation and its arguments,
    the bytes that its kernel takes beside them and the result. block: sizes are rounded up to multiples of it, as
    allocators do. times: how many alike each of the next operations stands for, when `flops` are counted.
    """

    def __init__(
        self, device: str, workspace: Callable[[Any, tuple[Any, ...]], int] = lambda operation, arguments: 0,
        block: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.device, self.workspace, self.block = device, workspace, block
        self.live = self.peak = self.flops = 0
        self.times = 1
        self._seen: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before: weights."""
        for tensor in tensors:
            self._add(tensor)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:                                # a question, asked very often
            return out
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.live + self.workspace(func, args))
        count = flop_formulas().get(func._overloadpacket)
        if count is not None:
            self.flops += self.times * count(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = -(-storage.nbytes() // self.block) * self.block
            self.live += size
            self._seen[key] = weakref.ref(storage, lambda gone: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        del self._seen[key]


@cache
def flop_formulas() -> dict[Any, Callable[..., int]]:
    """torch's, and those that it lacks, of attention and linear layers on a CPU.

    Imported when needed: they bring half of torch along.
    """
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def forward(q: Any, k: Any, v: Any, *more: Any, **named: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    def backward(d_out: Any, q: Any, k: Any, v: Any, *more: Any, **named: Any) -> int:
        return sdpa_backward_flop_count(d_out.shape, q.shape, k.shape, v.shape)

    def linear(x: Any, *more: Any, out_val: Any, **named: Any) -> int:
        return 2 * x.numel() * out_val.shape[-1]

    lacking = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):              # not in every build of torch
        lacking[torch.ops.mkldnn._linear_pointwise] = linear
    return {**flop_registry, **lacking}


FUSED_BACKWARD = (
    aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_flash_attention_backward
)  # fmt: skip


def cpu_workspace(operation: Any, arguments: tuple[Any, ...]) -> int:
    """oneDNN convolves tensors that lie in a blocked order of its own: it copies the weight into that order each time,
    and, unless they lie channels-last, what goes in and what comes out.
    """
    operands = _convolution(operation, arguments)
    if operands is None:
        return 0
    maps, weight = operands
    return weight.nbytes + sum(x.nbytes for x in maps if not is_channels_last(x))


def cuda_workspace(operation: Any, arguments: tuple[Any, ...]) -> int:
    """cuDNN convolves in 16 bits channels-last, on tensor cores: it copies what does not lie so. The backward pass of
    fused attention sums the gradient of q in float32.
    """
    if operation._overloadpacket in FUSED_BACKWARD:
        q = arguments[1]
        return 4 * q.numel()
    operands = _convolution(operation, arguments)
    if operands is None:
        return 0
    maps, weight = operands
    return sum(x.nbytes for x in (*maps, weight) if not is_channels_last(x))


def _convolution(operation: Any, arguments: tuple[Any, ...]) -> tuple[list[Tensor], Tensor] | None:
    """The feature maps that a convolution reads and writes, and its weight; None for any other operation.

    For sizes only: the map that is written is taken to be as large as the one that is read. Where channels are added
    that is too little, and matters little: there a network begins, and hardly anything else is held.
    """
    if operation._overloadpacket is aten.convolution:
        x, weight = arguments[:2]
        return [x, x], weight
    if operation._overloadpacket is aten.convolution_backward:
        d_out, x, weight = arguments[:3]
        return [d_out, x], weight
    return None


def is_channels_last(x: Tensor) -> bool:
    """Whether a feature map lies channels-last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
