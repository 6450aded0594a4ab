"""All that a training changes, as one value: each step makes the next state from the last.

So an interruption at any moment, of any kind, leaves a state that is whole, and a training continued from it
gives the numbers of an uninterrupted one, on a CPU bit for bit. The update is Adam's (Kingma & Ba 2015, algorithm 1),
which is AdamW without weight decay: decay would pull the word's vectors towards zero, where no word lives.

    m ← β1 m + (1 - β1) g,    s ← β2 s + (1 - β2) g²,
    v ← v - lr · (m / (1 - β1^k)) / (sqrt(s / (1 - β2^k)) + 1e-8)
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inversion.errors import InversionError
from inversion.scaling import after_overflow, after_updates
from models.replacing import write_pickle

BETAS, EPSILON = (0.9, 0.999), 1e-8
PROGRESS = 1e-3  # a validation loss lower by this part of the best one counts as progress


@dataclass(frozen=True)
class State:
    """vectors, mean, square, best: (n, D) float32 on the CPU: the word now, Adam's m and s, and the best word.

    step: steps taken, of which updates changed something; skipped: steps of non-finite loss, in_a_row those
    just now. losses: of every step, nan where skipped. history: a row a validation. best_step: when `best`
    was met. stale: validations since the last progress, and reference: the loss that counts as progress from.
    seconds: spent. scale: of the loss, None where it is not scaled; clean: updates since it changed.
    """

    vectors: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor
    step: int = 0
    updates: int = 0
    skipped: int = 0
    in_a_row: int = 0
    losses: tuple[float, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    best_step: int = 0
    best_loss: float = float("inf")
    reference: float = float("inf")
    stale: int = 0
    seconds: float = 0.0
    scale: float | None = None
    clean: int = 0

    @classmethod
    def start(cls, vectors: Tensor, scale: float | None = None) -> "State":
        """Before the first step. vectors: (n, D)."""
        vectors = vectors.detach().float().cpu().clone()
        return cls(vectors, torch.zeros_like(vectors), torch.zeros_like(vectors), vectors, scale=scale)

    def updated(self, gradient: Tensor, rate: float, loss: float) -> "State":
        """One step of Adam down a finite gradient (n, D) float32."""
        k, (beta1, beta2) = self.updates + 1, BETAS
        mean = beta1 * self.mean + (1 - beta1) * gradient
        square = beta2 * self.square + (1 - beta2) * gradient**2
        scale = (square / (1 - beta2**k)).sqrt() + EPSILON
        vectors = self.vectors - rate * (mean / (1 - beta1**k)) / scale
        passed = {"step": self.step + 1, "updates": k, "in_a_row": 0, "losses": (*self.losses, loss)}
        passed["scale"], passed["clean"] = after_updates(self.scale, self.clean + 1)
        return replace(self, vectors=vectors, mean=mean, square=square, **passed)

    def passed_over(self) -> "State":
        """A step whose loss or gradient was not finite changes no vector, is counted, and halves the scale."""
        counted = {"skipped": self.skipped + 1, "in_a_row": self.in_a_row + 1, "step": self.step + 1}
        counted |= {"scale": after_overflow(self.scale), "clean": 0}
        return replace(self, losses=(*self.losses, float("nan")), **counted)

    def validated(self, loss: float, row: dict[str, Any]) -> "State":
        """Note a validation loss, and the vectors if it is the lowest so far; a loss of nan never is."""
        state = replace(self, history=(*self.history, row))
        if loss < self.best_loss:
            state = replace(state, best=self.vectors, best_loss=loss, best_step=self.step)
        if loss < self.reference * (1 - PROGRESS):
            return replace(state, reference=loss, stale=0)
        return replace(state, stale=self.stale + 1)

    def save(self, path: Path, run: dict[str, Any]) -> None:
        """Write the state and a description of its run beside `path`, and rename. Raises OSError, for a full disk."""
        write_pickle(path, {"run": run, "state": asdict(self)})

    @classmethod
    def load(cls, path: Path, run: dict[str, Any], shape: torch.Size) -> "State":
        """Continue from a file of `save`. shape: of the vectors.

        Raises InversionError if it is none, is damaged, or belongs to another run.
        """
        if not path.is_file():
            raise InversionError(f"there is no training to resume: {path} does not exist")
        damaged = InversionError(f"{path} is damaged and cannot be resumed: start again in a new folder")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            theirs, state = dict(content["run"]), cls(**content["state"])
        except Exception as error:  # a damaged pickle fails in many ways
            raise damaged from error
        for key in sorted(run.keys() | theirs.keys()):
            if run.get(key) != theirs.get(key):
                raise InversionError(
                    f"{path} belongs to another run: its {key} is {theirs.get(key)}, not {run.get(key)}. "
                    "Resume with the same settings and files, or start in a new folder"
                )
        if not state._is_whole(shape):
            raise damaged
        return state

    def _is_whole(self, shape: torch.Size) -> bool:
        """Whether the fields are such as `save` can have written."""
        tensors = (self.vectors, self.mean, self.square, self.best)
        numbers = all(isinstance(x, Tensor) and x.shape == shape and x.dtype == torch.float32 for x in tensors)
        fresh = State.start(torch.zeros(shape, device="cpu"))
        counted = all(
            type(getattr(self, field.name)) is type(getattr(fresh, field.name))
            for field in fields(self) if field.name != "scale"
        )  # fmt: skip
        if not (numbers and counted and type(self.scale) in (float, type(None))):
            return False
        finite = all(bool(x.isfinite().all()) for x in tensors) and bool((self.square >= 0).all())
        in_order = 0 <= self.updates <= self.step == len(self.losses)
        return finite and in_order and all(isinstance(row, dict) for row in self.history)
