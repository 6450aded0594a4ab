"""What every layer of a UNet is told beside its input: the time, the text, and how it is to be run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.attend import AttentionKind
from models.checkpointing import Checkpointing, checkpoint
from models.first_run import FirstRun
from models.streaming import Window


class Condition(NamedTuple):
    """The two tensors, of which a layer's `reads` names those that it looks at, and three choices.

    emb:           (B, E) embedding of the time (and of whatever else is pooled into one vector).
    context:       (B, L, D) text features for cross-attention, or None.
    checkpointing: what is computed again in the backward pass instead of being kept: "none"; "attention", each
                   attention and each feed-forward; "blocks", each residual block and each transformer. What is dear
                   for the memory that it takes is kept all the same, see `checkpointing.dear`.
    attention:     the kernel, see `attend`; "auto" is the fastest.
    window:        what the layers' weights pass through, if they are streamed.
    """

    emb: Tensor
    context: Tensor | None
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    window: Window | None = None

    def run(self, level: Checkpointing, part_of: nn.Module, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), a part of a module; as a checkpoint if that level is asked for.

        Even where there is no checkpoint, the function sees an alias of each input, which collects the gradients of its
        uses: so they are added in the same order at every level, and are the same to the bit. Raises RuntimeError in
        the backward pass if the module has other weights by then, as after `torch.func.functional_call`, or is called
        otherwise, by other hooks for example.
        """
        inputs = [x.view_as(x) for x in inputs]
        if level == "none" or level != self.checkpointing:
            return function(*inputs)
        first = FirstRun(part_of)

        def run(*inputs: Tensor) -> Any:
            first.require_unchanged()
            return function(*inputs)

        return checkpoint(run, *inputs, weights=part_of.parameters())
