"""Which settings there are to choose from, which of the planned is the fastest, and all of them as a table."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inversion.errors import InversionError
from inversion.sizes import parsed, size
from models import Setting
from models.attend import best_kind
from models.processor import cpu_has_bfloat16

EXCHANGE = 1000         # operations in the time in which a byte gets to the device: 10 TFLOP/s over 10 GB/s


@dataclass(frozen=True)
class Planned:
    """A setting, and what a training in it is predicted to take.

    peak: bytes on the device, at most. operations: floating-point ones of a forward and backward pass. moved: bytes
    that come to the device in it.
    """

    setting: Setting
    peak: int
    operations: int
    moved: int

    @property
    def cost(self) -> float:
        """What time it takes, in operations: a byte moved counts as `EXCHANGE` of them."""
        return self.operations + EXCHANGE * self.moved


def settings_for(device: torch.device, **fixed: Any) -> list[Setting]:
    """The settings that make sense on a device, of dtypes and kernels the faster first.

    fixed: fields of a Setting that are given. bfloat16 on a GPU takes what float16 takes. On a CPU, where a row of a
    plan takes seconds, "idle" is left out, which saves a tenth where "stream" saves three quarters, and the slimmer
    kernel beside "stream". Raises ModelError as `Setting`, if what is given does not go together.
    """
    on_cpu = device.type == "cpu"
    dtypes, offloads = [torch.float16, torch.float32], ["none", "idle", "stream"]
    if on_cpu:
        dtypes = [torch.bfloat16, torch.float32] if cpu_has_bfloat16() else [torch.float32, torch.bfloat16]
        offloads.remove("idle")
    axes = {"dtype": dtypes, "checkpointing": ["none", "attention", "blocks"], "offload": offloads}
    axes |= {name: [value] for name, value in fixed.items() if value is not None and name != "attention"}
    found, both = [], bool(fixed.get("offload") and fixed.get("checkpointing"))
    for dtype, checkpointing, offload in itertools.product(*axes.values()):
        fast = best_kind(torch.empty(0, dtype=dtype, device="cpu" if on_cpu else "meta"))
        slim = "fused" if fast == "sliced" else "sliced"
        kinds = [fast] if on_cpu and offload == "stream" else [fast, slim]
        for kind in [fixed["attention"]] if fixed.get("attention") else kinds:
            if offload != "stream" or checkpointing == "blocks" or both:      # Setting says what does not go together
                found.append(Setting(dtype, checkpointing, kind, offload))
    return found


def fastest(planned: Sequence[Planned], budget: int | str) -> Planned:
    """The fastest of the settings that fit a budget: of the first dtype with any, the one of least cost.

    budget: bytes, or a size as people write it, "6GiB". Raises InversionError if none fits, naming the smallest and
    what it needs, for no settings, and for a text that is no size.
    """
    budget = parsed(budget) if isinstance(budget, str) else budget
    if not planned:
        raise InversionError("of no settings none is the fastest: plan some")
    fits = [each for each in planned if each.peak <= budget]
    if not fits:
        least = min(planned, key=lambda each: each.peak)
        given, needed = size(budget), size(least.peak)
        if given == needed:                         # to the rounding
            given, needed = f"{budget} bytes", f"{least.peak}"
        raise InversionError(
            f"{given} are too small for every setting: the smallest, {least.setting}, needs {needed}; "
            "raise the budget, allow more settings, or take a smaller resolution or batch"
        )
    same, least = [each for each in fits if each.setting.dtype == fits[0].setting.dtype], min(e.cost for e in planned)
    return min(same, key=lambda each: round(each.cost / least, 2))      # of equals the first


def table(planned: Sequence[Planned], budget: int | None = None) -> str:
    """A plan for people. budget: bytes; what fits is marked, and what is fastest of it."""
    least = min(each.operations for each in planned)
    best = fastest(planned, budget) if budget and any(each.peak <= budget for each in planned) else None
    rows = [("dtype", "checkpointing", "attention", "offload", "peak", "compute", "moved a step", "")]
    for each in planned:
        how, fits = each.setting, budget is not None and each.peak <= budget
        mark = "<- fastest that fits" if each is best else "fits" if fits else ""
        numbers = (size(each.peak), f"{each.operations / least:.2f}", size(each.moved) if each.moved else "-")
        dtype = str(how.dtype).removeprefix("torch.")
        rows.append((dtype, how.checkpointing, how.attention, how.offload, *numbers, mark))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
