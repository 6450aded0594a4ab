"""A counter of what autograd keeps for the backward pass."""

import torch
from torch import Tensor


class SavedBytes:
    """A context that counts what autograd keeps for the backward pass: each storage once, `weights` not at all."""

    def __init__(self, *weights: Tensor) -> None:
        self.weights, self.storages = {self._key(weight) for weight in weights}, {}

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> Tensor:
        if (key := self._key(x)) not in self.weights:
            self.storages[key] = x.untyped_storage()                   # held, so that no other gets its key
        return x

    @staticmethod
    def _key(x: Tensor) -> int:
        return x.untyped_storage()._cdata
