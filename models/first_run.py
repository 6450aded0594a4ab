"""What a first run tells of a module, so that a second one, for the gradient, is known to be the same.

A checkpoint computes its function again when the gradient is wanted. If the module has other weights by then, or other
hooks, the gradient would be that of another function, and nothing would tell.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from models.lending import my_turn, parameters_of
from models.mapped import Seen


def seen(module: nn.Module) -> list[Seen]:
    """The weights of a module as they are now."""
    with my_turn:
        return [Seen(own) for own in parameters_of(module)]


def unchanged(first: Sequence[Seen], module: nn.Module) -> bool:
    """Whether a module's weights are those that were seen."""
    now = parameters_of(module)
    return len(first) == len(now) and all(each.is_still(own) for each, own in zip(first, now))


class FirstRun:
    """A module as it is now, which a second run, for the gradient, has to find so: its weights, and which of them are
    trained, its buffers, and what calls it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.weights, self.calls = module, seen(module), calls(module)
        self.trained, self.buffers = trained(self.weights), [Seen(each) for each in module.buffers()]

    def require_unchanged(self) -> None:
        """Raise RuntimeError unless it is: the second run would not be that of the first."""
        changed = "" if unchanged(self.weights, self.module) else "weights were changed, or had others in their place,"
        if not changed and calls(self.module) != self.calls:
            changed = "hooks or layers were put in, taken out or replaced, or train and eval changed,"
        if not changed and trained(self.weights) != self.trained:
            changed = "weights were frozen or unfrozen,"
        now = list(self.module.buffers())
        if not changed and not (len(now) == len(self.buffers) and all(map(Seen.is_still, self.buffers, now))):
            changed = "buffers were changed, as layers that train do to their own that average what they see,"
        if changed:
            raise RuntimeError(
                f"{changed} between a forward and its backward pass, which computes once more: change nothing before "
                "the gradient is there, or load the model without checkpointing and offload"
            )


def trained(weights: Sequence[Seen]) -> list[bool]:
    """Which of them ask for a gradient now."""
    return [each.weight.requires_grad for each in weights]


def calls(module: nn.Module) -> list[Any]:
    """What a call of a module runs: its parts, with the forward and the hooks of each, and whether it is training."""
    found: list[Any] = [bool(_has_any_global_hook())]
    for part in module.modules():
        hooks = part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks
        own = [vars(part).get(name) for name in ("forward", "_conv_forward", "padding_mode", "training")]
        found.append((part, getattr(type(part), "forward", None), *own, *map(tuple, hooks)))    # TorchScript's has none
    return found
