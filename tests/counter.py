"""How many bytes autograd keeps for the backward pass."""

import torch
from torch import Tensor


class Counter:
    """The bytes that autograd keeps, each storage once; `weights` are not counted."""

    def __init__(self, *weights: Tensor) -> None:
        self.known, self.kept = {w.untyped_storage().data_ptr() for w in weights}, {}

    @property
    def bytes(self) -> int:
        return sum(self.kept.values())

    def __enter__(self) -> "Counter":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return x
