"""What the training scripts share: weights with a float32 master, their average, and checkpoints that survive anything.

A step's randomness comes from a generator seeded by (seed, step) alone, so a resumed run repeats the numbers of an
uninterrupted one bit for bit without keeping any generator's state.
"""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _muon import Muon
from _runs import save_flags
from torch import Tensor, nn
from tqdm import tqdm

from inversion.config import cosine
from inversion.training import step_generator
from models import ModelError
from models.replacing import write_pickle


class Trainer:
    """AdamW on float32 master weights of networks that compute in another dtype, with their moving average.

    networks: float32, of which the masters are taken; they are then cast to dtype.
    best: the lowest held-out loss so far; the caller's, kept with the rest.
    taught: what tells what is learned from, as `digest` of the pictures does, so that nothing else is resumed with.
    muon: which weights, by their names, are Muon's instead (see `_muon`): the matrices of hidden layers.
    Learning rate: linear warm-up, then half a cosine to zero. The average's decay starts low, (1 + k) / (10 + k),
    so that it forgets the random start. Gradients are clipped to norm 1.
    """

    def __init__(
        self, networks: dict[str, nn.Module], lr: float, steps: int, warmup: int, decay: float,
        dtype: torch.dtype = torch.float32, muon: Callable[[str, Tensor], bool] = lambda name, weight: False,
        taught: str = "",
    ) -> None:  # fmt: skip
        named = [(f"{key}.{n}", p) for key, net in networks.items() for n, p in net.named_parameters()]
        self.names, self.weights = [n for n, _ in named], [p for _, p in named]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.weights]
        self.average = [p.detach().clone() for p in self.master]
        for network in networks.values():
            network.to(dtype)
        hidden = [muon(name, weight) for name, weight in zip(self.names, self.weights)]
        of = {kind: [p for p, is_hidden in zip(self.master, hidden) if is_hidden == kind] for kind in (False, True)}
        self.optimizers = [torch.optim.AdamW(of[False], lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
        self.optimizers += [Muon(of[True], lr=lr)] if of[True] else []
        self.lr, self.steps, self.warmup, self.decay, self.step, self.failed = lr, steps, warmup, decay, 0, 0
        self.best, self.taught = math.inf, taught

    def update(self, loss: Tensor) -> float:
        """One optimiser step down the gradient of `loss` (a scalar). Returns its value.

        A step without a finite gradient changes no weight; raises ModelError at the tenth in a row.
        """
        loss.backward()
        for master, weight in zip(self.master, self.weights):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(self.master, 1.0)
        self.failed = 0 if norm.isfinite() and loss.isfinite() else self.failed + 1
        if self.failed == 10:
            raise ModelError(f"no finite gradient in ten steps in a row, to step {self.step}: lower the learning rate")
        self.step += 1
        if self.failed:
            return loss.item()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * cosine(self.step - 1, self.steps, self.warmup)
            optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.master, 1 - decay)
            for master, weight in zip(self.master, self.weights):
                weight.copy_(master)
        return loss.item()

    def is_sound(self) -> bool:
        """Whether its last gradient was finite, and all weights are: a rate can be too large for float32."""
        return not self.failed and all(bool(master.isfinite().all()) for master in self.master)

    def put(self, which: list[Tensor]) -> None:
        """Write `self.master` or `self.average` into the networks."""
        with torch.no_grad():
            for value, weight in zip(which, self.weights):
                weight.copy_(value)

    def save(self, path: Path) -> None:
        """Everything a resumed run needs, written beside `path` and renamed. Raises OSError, for a full disk too."""
        state = {"step": self.step, "names": self.names, "optimizers": [each.state_dict() for each in self.optimizers]}
        state |= {"master": [p.detach() for p in self.master], "average": self.average}
        state |= {"taught": self.taught, "best": self.best}
        write_pickle(path, state)

    def load(self, path: Path) -> None:
        """Continue from a file of `save`, if it is there. Raises ModelError for a damaged one, and another's."""
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            names, taught, step, best = state["names"], state["taught"], int(state["step"]), float(state["best"])
            shapes = [[p.shape for p in state[key]] for key in ("master", "average")]
        except Exception as error:          # a foreign file may fail in any way at all
            raise _damaged(path) from error
        if taught != self.taught:
            raise ModelError(
                f"{path} holds a training on other pictures, names, captions or latents: put back what it began with, "
                "or start anew, into another --output"
            )
        mine = [p.shape for p in self.master]
        if names != self.names or shapes != [mine, mine]:
            raise ModelError(f"{path} holds the training of other networks: give the sizes that it was started with")
        with torch.no_grad():
            for key in ("master", "average"):
                for mine, theirs in zip(getattr(self, key), state[key]):
                    mine.copy_(theirs)
        try:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except Exception as error:
            raise _damaged(path) from error
        self.step, self.best = step, best
        self.put(self.master)


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path} is damaged: start anew, into another --output")


def run_steps(
    trainer: Trainer, checkpoint: Path, loss: Callable[[torch.Generator], Tensor], config: Any, save_every: int
) -> Iterator[tuple[int, float]]:
    """Train to the last step with a progress bar; save every so often, at the end, and on Ctrl-C before leaving.

    A terminated process (SIGTERM) saves as well: long runs are often in the background, where shells turn Ctrl-C off.
    config: the script's flags, among them the seed; they are kept beside the checkpoint.
    Yields (steps done, smoothed loss) after each step.
    """
    stop: list[int] = []  # a signal waits for the end of its step, or half an update would be saved
    before = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    smooth = math.nan
    bar = tqdm(range(trainer.step, trainer.steps), initial=trainer.step, total=trainer.steps, mininterval=2.0)

    def save() -> None:
        if not trainer.is_sound():                      # what was saved before stays
            return
        save_flags(checkpoint.parent, config)
        trainer.save(checkpoint)

    try:
        for step in bar:
            value = trainer.update(loss(step_generator(config.seed, step)))
            smooth = value if math.isnan(smooth) else 0.99 * smooth + 0.01 * value
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            yield trainer.step, smooth                  # what is done with it belongs into what is saved
            if trainer.step % save_every == 0:
                save()
            if stop:
                raise KeyboardInterrupt
        if not trainer.is_sound():
            raise ModelError(f"no finite gradient was left at the end, step {trainer.step}: lower the learning rate")
        save()
    except KeyboardInterrupt:
        save()
        if checkpoint.exists():
            bar.write(f"interrupted; continue with --output {checkpoint.parent} --resume")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:                                            # it came while the end was saved
        raise KeyboardInterrupt
