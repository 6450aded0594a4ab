"""Where the time of a step goes, and how far it is from what the processor's products allow.

    python benchmarks/shares.py [--json FILE]

A profiled step of each side, divided: convolutions; linear layers (1x1 convolutions too); attention, its products and
its softmax; norms; the rest (activations, sums, copies). The parts of a row are seconds of that part. "limit" compares
our whole step with the time that its products alone (the floating-point operations of linear layers, convolutions
and attention, counted once) would take at the best speed that this machine reaches, of a square matrix product or of a
3x3 convolution: its peer is the processor.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from _measure import command, row
from _networks import ours, peer
from _process import Process, Side, Sides, Step, Work
from guided_step import start_ours as start_guided
from guided_step import start_peer as start_guided_peer
from inversion_step import TRAINED_PEER
from inversion_step import start_ours as start_inversion
from inversion_step import start_peer as start_inversion_peer
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models.presets import SD1
from models.unet import UNet

GUIDED = Side(ours, start_guided), Side(peer, start_guided_peer)
INVERSION = Side(ours, start_inversion), Side(TRAINED_PEER, start_inversion_peer)
WORKS = {
    Work("guided_step", "float32", 512): GUIDED,
    Work("guided_step", "bfloat16", 512): GUIDED,
    Work("inversion_step", "float32", 256): INVERSION,
    Work("inversion_step", "bfloat16", 512): INVERSION,
}
NAMES = {  # parts of the names of torch's operators and of our autograd functions, in the order in which they are tried
    "convolution": ("conv",),
    "attention": ("attention", "bmm", "softmax", "logsumexp"),
    "linear": ("mm", "linear"),
    "norms": ("norm",),
}
PARTS = (*NAMES, "rest")


def parts(step: Step) -> dict[str, float]:
    """Seconds of each part in a step."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiled.events():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6
    return seconds


def part_of(event: FunctionEvent | None) -> str:
    """The part that an operator belongs to: by its own name, or by that of what called it.

    Matrix products and copies that our convolutions are made of belong to the convolution.
    """
    if event is None:
        return "rest"
    name = event.name.lower()
    part = next((part for part, words in NAMES.items() if any(word in name for word in words)), None)
    if part == "convolution" and any(len(shape) == 4 and shape[2:] == [1, 1] for shape in event.input_shapes[1:3]):
        return "linear"                     # the weight of a 1x1 convolution
    if part == "convolution" or event.cpu_parent is None:
        return part or "rest"
    above = part_of(event.cpu_parent)
    return above if above == "convolution" or part is None else part


def operations(work: Work) -> int:
    """The floating-point operations that the products of a step take, a multiplication and an addition being two."""
    side = work.resolution // 8
    with torch.device("meta"):
        unet = UNet(SD1.unet)
        texts = 2 if work.work == "guided_step" else 1
        context = torch.randn(texts, 77, 768, requires_grad=True)
        x, t = torch.randn(1, 4, side, side), torch.zeros(1)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):         # the counter does not know the fused kernel's operations
        out = unet.requires_grad_(False)(x, t, context, attention="fused")
        if work.work == "inversion_step":
            out.sum().backward()
    return counter.get_total_flops()


def best_speed(dtype: torch.dtype) -> float:
    """Operations a second of the faster: a square matrix product, or a 3x3 convolution over 64x64 positions."""
    a = torch.randn(2048, 2048, dtype=dtype)
    conv = nn.Conv2d(320, 320, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(2, 320, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    return max(speed(lambda: a @ a, 2 * 2048**3), speed(lambda: conv(x), 2 * x.numel() * conv.weight[0].numel()))


def speed(product: Step, flops: int) -> float:
    """Operations a second, the best of several."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return flops / min(seconds)


def measure() -> Iterator[dict[str, Any]]:
    """A row for each part of each of WORKS, and one for the limit."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler has much to say about GPUs
    for work, (mine, theirs) in WORKS.items():
        with Sides([Process("ours", mine, work), Process("peer", theirs, work)]) as sides:
            for side in sides:
                side.ask("start", work)
                side.ask("warm")
            seconds = sides[0].ask("step")
            divided = [side.ask(parts) for side in sides]
        for part in PARTS:
            yield row(named(work, part), *(each[part] for each in divided))
        yield row(named(work, "limit"), seconds, operations(work) / best_speed(getattr(torch, work.dtype)))


def named(work: Work, what: str) -> Work:
    """A row's work that says what of it."""
    return Work(f"{work.work}: {what}", work.dtype, work.resolution, work.mode)


if __name__ == "__main__":
    command(__doc__, measure)
