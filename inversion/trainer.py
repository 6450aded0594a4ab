"""A whole training in one call: every step, what is kept on disk meanwhile, and the numbers at the end."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inversion.concept import Concept
from inversion.config import TrainConfig
from inversion.errors import InversionError
from inversion.exhaustion import advice, is_out_of_memory, let_go
from inversion.formats import require_place
from inversion.interruption import unbroken
from inversion.training import DEFAULTS, StepReport, Training
from models.files import as_path


@dataclass(frozen=True)
class Result:
    """concept: with the best vectors. history: a row a validation, with each vector's norm and cosine to its start.

    metrics: validation_loss_initial, _best, _caption (None without a name), best_step, steps, skipped_steps,
    seconds, peak_memory_bytes of the process, and peak_device_memory_bytes of a GPU, both since the process began; None
    without a GPU.
    """

    concept: Concept
    metrics: dict[str, Any]
    history: tuple[dict[str, Any], ...]


def train(
    model: Any, concept: Concept, images: Tensor, templates: Sequence[Sequence[str]],
    config: TrainConfig = DEFAULTS,
    *, name: str | None = None, file: str | Path | None = None, resume: bool = False, keep_encoder: bool = False,
    on_step: Callable[[StepReport], object] | None = None,
) -> Result:  # fmt: skip
    """Learn a word, and write it.

    images, templates, keep_encoder: see `Training`. name: what the concept is in plain words, for the loss
    that the word competes with. file: where the best concept goes, FILE.safetensors, and beside it the state
    of the training, FILE.training.pt: at every checkpoint, at the end, and before any interruption (Ctrl-C
    too) is passed on. resume: continue from that state. on_step: called after each step.

    Raises what `Training` does, and InversionError when there is nothing to resume, for a file that is named as a
    pickle or cannot be written, and when a device runs out of memory, naming the next cheaper setting.
    """
    if resume and file is None:
        raise InversionError("there is nothing to resume: say which file the interrupted training writes")
    file = None if file is None else as_path(file)
    if file is not None:
        require_place(file)
    there = _changed(file)
    try:
        training = _trained(model, concept, images, templates, config, file, resume, keep_encoder, on_step)
        return Result(training.best(), _metrics(training, name), training.state.history)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        saved = resume or _changed(file) != there
        kept = f"; the vectors so far are saved, {state_file(file)} can be resumed from" if saved else ""
        raise InversionError(advice(model, images.shape[-1], config.batch_size) + kept) from error


def _changed(file: Path | None) -> int | None:
    """When the state of a training of a concept's file was last written; None if there is none."""
    return state_file(file).stat().st_mtime_ns if file is not None and state_file(file).exists() else None


def _trained(
    model: Any, concept: Concept, images: Tensor, templates: Sequence[Sequence[str]], config: TrainConfig,
    file: Path | None, resume: bool, keep_encoder: bool, on_step: Callable[[StepReport], object] | None,
) -> Training:  # fmt: skip
    """The training when it has ended, everything written. Whatever ends it early finds the state written, too."""
    training = Training(model, concept, images, templates, config, keep_encoder)
    if resume:
        training.resume(state_file(file))
    try:
        for report in training.steps():
            if file is not None and report.step % config.checkpoint_every == 0:
                with unbroken():
                    training.save(state_file(file))
            if on_step is not None:
                on_step(report)
        _write(training, file, ended=True)
    except BaseException:
        _write(training, file, ended=False)
        raise
    return training


def _write(training: Training, file: Path | None, ended: bool) -> None:
    """The state, and the best word so far; if nothing was better than the start, only when the training has ended.

    The word first: it is the smaller, where a disk is nearly full. Of two that fail the state's error is raised.
    """
    if file is None or not training.state.history:
        return
    with unbroken():
        try:
            if ended or training.state.best_step:
                training.best().save(file)
        finally:
            training.save(state_file(file))


def state_file(file: str | Path) -> Path:
    """Where the state of the training of a concept's file is kept: beside it, .training.pt for its format's ending."""
    file = as_path(file)
    return file.with_name((file.stem if file.suffix == ".safetensors" else file.name) + ".training.pt")


def peak_memory() -> int:
    """The largest resident size that this process has had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _metrics(training: Training, name: str | None) -> dict[str, Any]:
    state, device = training.state, training.model.device
    return {
        "validation_loss_initial": state.history[0]["validation_loss"],
        "validation_loss_best": state.best_loss,
        "validation_loss_caption": None if name is None else training.validation.loss(name),
        "best_step": state.best_step,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "seconds": round(state.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
