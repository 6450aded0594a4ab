"""How weights get from host memory into a place on a device: at once, or beside what computes.

A place is a vector in which the weights of one layer lie, one after the other.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from models.layout import copy_into, format_of

PLACES = 2
ALIGNED = 64  # elements, so that every weight starts on a multiple of 128 bytes or more


class Copier(Protocol):
    """How weights get from the host into a place. places: how many there are; of two, one is filled ahead."""

    places: int

    def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> Any:
        """Copy each host tensor, cast to the other's dtype, into a device's; returns a ticket for `wait`."""

    def wait(self, ticket: Any) -> None:
        """What computes after this finds the weights complete."""


class CopyAtOnce:
    """Copies when it is asked to: on a CPU nothing can go on beside it that would not slow it down, so that a second
    place would be of no use.
    """

    def __init__(self, places: int = 1) -> None:
        self.places = places

    def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> None:
        """See `Copier`."""
        for source, target in zip(host, device):
            copy_into(target, source)

    def wait(self, ticket: None) -> None:
        """Nothing: it has happened."""


class CopyBeside:
    """Copies on a CUDA stream of its own, from pinned memory, which a thread fills: the GPU computes meanwhile.

    size: elements of a place. The host memory that this pins is PLACES * size elements, more if a place grows.
    """

    places = PLACES

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pinned = [torch.empty(size, dtype=dtype, device="cpu", pin_memory=True) for _ in range(PLACES)]
        self.sent: list[torch.cuda.Event | None] = [None] * PLACES
        # a thread of its own begins at cuda:0, where to be would take memory
        begin = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.index is not None else {}
        self.thread = ThreadPoolExecutor(1, "weights", **begin)

    def __reduce__(self) -> tuple[Any, ...]:
        return CopyBeside, (max(map(len, self.pinned)), self.pinned[0].dtype, self.device)

    def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> "Future[torch.cuda.Event]":
        """See `Copier`. The place is overwritten once everything that the GPU was told before this has been done."""
        free = torch.cuda.current_stream(self.device).record_event()
        return self.thread.submit(self._copy, place, host, device, free)

    def wait(self, ticket: "Future[torch.cuda.Event]") -> None:
        """See `Copier`: the GPU waits for the weights, and this thread only until their copy has been ordered."""
        torch.cuda.current_stream(self.device).wait_event(ticket.result())

    @torch.no_grad()
    def _copy(
        self, place: int, host: Iterable[Tensor], device: Sequence[Tensor], free: torch.cuda.Event
    ) -> torch.cuda.Event:
        if self.sent[place] is not None:
            self.sent[place].synchronize()           # what was pinned there before has left
        if extent(device) > len(self.pinned[place]):
            dtype = self.pinned[place].dtype
            self.pinned[place] = torch.empty(extent(device), dtype=dtype, device="cpu", pin_memory=True)
        pinned = views(self.pinned[place], device)
        for source, target in zip(host, pinned):
            target.copy_(source)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(free)
            for source, target in zip(pinned, device):
                target.copy_(source, non_blocking=True)
                if target.is_cuda:
                    target.record_stream(self.stream)      # a place that is given up is no one's before this is done
            self.sent[place] = self.stream.record_event()
        return self.sent[place]


def extent(weights: Iterable[Tensor]) -> int:
    """How many elements weights take in a place, each aligned."""
    return sum(-(-w.numel() // ALIGNED) * ALIGNED for w in weights)


def views(place: Tensor, weights: Iterable[Tensor]) -> list[Tensor]:
    """Tensors as `layout.converted` would lay the weights, one after the other in a place."""
    found, start = [], 0
    for w in weights:
        piece = place[start : start + w.numel()]
        like = torch.empty_like(w, device="meta", memory_format=format_of(w, place.device, place.dtype))
        found.append(piece.as_strided(w.shape, like.stride(), start))
        start += extent([w])
    return found
