"""The flags of a command that say how a model is run, and the plan that chooses for them."""

from dataclasses import replace
from typing import Any

import torch

import inversion
from inversion.choice import table
from inversion.sizes import parsed, size
from models.devices import choose_device
from models.weights import choose_dtype

HOW = ("checkpointing", "attention", "offload")


def how(config: Any) -> dict[str, str]:
    """The keyword arguments of `models.load` that a command's flags stand for; one that is None, or not there, is the
    simplest.
    """
    chosen = {name: flag for name in HOW if (flag := getattr(config, name, None)) is not None}
    if chosen.get("offload") == "stream":
        chosen = {"checkpointing": "blocks"} | chosen
    return chosen


def planned(config: Any, shell: Any, side: int, batch_size: int) -> list[inversion.Planned]:
    """A plan of the settings that the flags leave open. config: with dtype, device, and the names in `HOW`."""
    device = choose_device(config.device, must_be_there=False)
    fixed = how(config)
    if config.dtype is not None:
        fixed["dtype"] = choose_dtype(config.dtype, torch.float32, device)
    return inversion.plan(shell, side, batch_size, device, inversion.settings_for(device, **fixed))


def show(config: Any, shell: Any, side: int, batch_size: int) -> None:
    """Print the plan."""
    device = choose_device(config.device, must_be_there=False)
    budget = None if config.memory_budget is None else parsed(config.memory_budget)
    found = planned(config, shell, side, batch_size)
    print(f"{shell.source}, {side}x{side} pixels, batch {batch_size}, on {device.type}: the peak of a training")
    print(table(found, budget))
    if budget is not None:
        inversion.fastest(found, budget)                            # says so if there is none


def within_budget(config: Any, shell: Any, side: int, batch_size: int, drawn: int) -> Any:
    """The flags with the fastest setting that fits --memory-budget, which is said in a line.

    drawn: how many images are drawn at once when the training has ended; if that takes more, this is said, too.
    """
    budget = parsed(config.memory_budget)
    best = inversion.fastest(planned(config, shell, side, batch_size), budget)
    print(f"{size(best.peak)} of {config.memory_budget}: {best.setting}")
    device = choose_device(config.device, must_be_there=False)
    afterwards = inversion.drawing(shell, best.setting, side, drawn, device)
    if config.samples and afterwards > budget:
        print(f"drawing the samples afterwards takes {size(afterwards)}, more than that: --samples 0 leaves it out")
    chosen = {name: getattr(best.setting, name) for name in HOW}
    return replace(config, dtype=str(best.setting.dtype).removeprefix("torch."), **chosen)
