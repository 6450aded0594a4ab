"""A network on a device that is too small for it: its layers' weights pass through a window of two places.

    host      layer 0   layer 1   layer 2   ...              the file's memory map, or whatever the weights are
                 │         │ fetched ahead
    device   [ place ] [ place ]                             each as large as the largest layer

While a layer computes in one place, the next one's weights are copied into the other: upwards through the network
forward, downwards backward. Each layer is a checkpoint, so nothing of it outlives its turn but its inputs and what is
dear (see `checkpointing.dear`), and its weights come a second time when its gradient is computed. Values and gradients
are those of the network itself.

On a CPU weights are in reach already. What is converted goes into a place from a map of its own, see `mapped`, and one
place will do, since nothing is fetched ahead; what is not converted is read in such a map, and there is no place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpointing import checkpoint
from models.copying import Copier, CopyAtOnce, CopyBeside, extent, views
from models.errors import ModelError
from models.first_run import FirstRun, seen, unchanged
from models.lending import computing_with, my_turn, parameters_of
from models.mapped import Mapped, Seen, mapped


class Window:
    """The places on a device through which the weights of layers pass, and the layers' computation with them.

    layers: in the order in which the network runs them; their own weights stay where they are and are only read, each
    time as they are then, see `Seen`: one may be replaced by another, and there may be more of them, as of a LoRA.
    dtype: that the layers run in on the device. copier: how weights get there, and through how many places; None for
    what suits the device. On a CPU that is no copy at all, if they have that dtype already.
    """

    def __init__(
        self, layers: Sequence[nn.Module], device: torch.device, dtype: torch.dtype, copier: Copier | None = None
    ) -> None:
        self.layers, host = list(layers), [parameters_of(layer) for layer in layers]
        self.index = {layer: i for i, layer in enumerate(layers)}
        self.mapped = mapped(host, device)
        lie_there = device.type == "cpu" and all(weight.dtype == dtype for weights in host for weight in weights)
        self.moves = copier is not None or not lie_there
        size = max(extent(weights) for weights in host) if self.moves else 0
        beside = device.type == "cuda" and torch.cuda.is_available()
        self.copier = copier or (CopyBeside(size, dtype, device) if beside else CopyAtOnce())
        count = self.copier.places
        self.places = [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
        self.held: list[tuple[int, list[Seen]] | None] = [None] * count     # which layer lies there, and its weights
        self.tickets: list[Any] = [None] * count
        self.last = -1                                           # the layer that was taken last

    def __copy__(self) -> "Window":
        return self                         # what shares the places has to know what lies in them

    def __getstate__(self) -> dict[str, Any]:
        nothing = [None] * len(self.places)                      # what is on its way stays here; a copy fetches its own
        return vars(self) | {"held": nothing, "tickets": list(nothing)}

    def run(self, layer: nn.Module, x: Tensor, cond: Any) -> Tensor:
        """layer(x, cond), as a checkpoint for which its weights come each time. cond: a models.condition.Condition.

        Of the condition only what the layer reads goes through the checkpoint: what needs no gradient keeps nothing.
        Raises ModelError for a layer that is trained, or was put in later; in the backward pass RuntimeError for one
        that was changed.
        """
        if layer not in self.index:
            raise ModelError(
                f"a layer of type {type(layer).__name__} was put into a network that is streamed, and its weights have "
                "no way to the device: load the model without offload, or put it into one of the layers that were there"
            )
        reads, first = getattr(layer, "reads", ()), FirstRun(layer)
        if torch.is_grad_enabled() and any(each.weight.requires_grad for each in first.weights):
            raise ModelError("the weights of a streamed network get no gradient: load it without offload to train them")

        def compute(x: Tensor, *read: Tensor) -> Tensor:
            inside = cond._replace(window=None, checkpointing="none", **dict(zip(reads, read)))
            with my_turn:
                first.require_unchanged()
                with computing_with(layer, self.take(self.index[layer])):
                    return layer(x, inside)

        return checkpoint(compute, x, *(getattr(cond, name) for name in reads), turn=my_turn)

    def take(self, i: int) -> list[Tensor]:
        """The weights of layer i on the device; if there is a second place, the layer after it, in the direction of
        travel, is on its way.
        """
        if not self.moves:
            return [weight.anew() for weight in self._weights(i)]
        here = self._bring(i, other_than=None)
        try:
            self.copier.wait(self.tickets[here])
        except BaseException:
            self.held[here] = None                                 # a copy that failed: the next one begins anew
            raise
        ahead = i + 1 if i == 0 or i > self.last else i - 1
        self.last = i
        if len(self.places) > 1 and 0 <= ahead < len(self.layers):
            self._bring(ahead, other_than=here)
        return views(self.places[here], parameters_of(self.layers[i]))

    @torch.no_grad()
    def _bring(self, i: int, other_than: int | None) -> int:
        """The place where layer i lies, or is now being copied to."""
        for place, held in enumerate(self.held):
            if held and held[0] == i and unchanged(held[1], self.layers[i]):
                return place
        place = next(p for p in range(len(self.places)) if p != other_than)
        self.held[place] = None                                    # until it is there: a copy may be interrupted
        weights, first = self._weights(i), seen(self.layers[i])
        size = extent(weight.weight for weight in weights)
        if size > len(self.places[place]):                         # something was put into the layer since
            with torch.inference_mode(False):                      # others will write into it, too
                self.places[place] = self.places[place].new_empty(size)
        read = (weight.anew() for weight in weights)
        self.tickets[place] = self.copier.begin(place, read, views(self.places[place], [w.weight for w in weights]))
        self.held[place] = i, first
        return place

    def _weights(self, i: int) -> list[Mapped]:
        """Layer i's weights; one that came later lies in no file that is known."""
        known = {id(each.weight): each for each in self.mapped[i]}
        return [known.get(id(own)) or Mapped(own, []) for own in parameters_of(self.layers[i])]
