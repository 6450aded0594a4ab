"""Textual inversion: everything is frozen but the n vectors of one word.

    images ──moments, cached──▶ draw_x0 ──▶ x_0 ──q_sample──▶ x_t ──┐
    templates ──▶ ids ──encode_text, vectors──▶ context ────────────┴──▶ predict ──▶ loss ──▶ vectors

`model` is anything with what `models.LatentModel` offers: tokenizer, schedule, prediction, device, dtype, width,
family, source, setting, moments, draw_x0, x0_shape, encode_text, predict, release_encoder. Nothing here asks which
family it is.

Vectors, optimiser and losses are float32 on the CPU whatever the networks run in; the loss of networks in float16 is
scaled (see `scaling`). The random numbers of a step come from a generator seeded by (seed, step) alone, so no
generator's state needs keeping. A step that meets a non-finite loss or gradient is passed over; a training that meets
them again and again, or that moves nothing, stops and says so.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import Schedule
from inversion.concept import Concept
from inversion.config import TrainConfig
from inversion.errors import InversionError
from inversion.objective import Batch, loss_and_gradient, random_batch
from inversion.prompts import check_prompts
from inversion.scaling import first_scale
from inversion.state import State
from inversion.validation import Validation
from models.files import as_path
from models.offload import runs_in

MOVED_BY = 10  # updates after which every vector must have moved
NON_FINITE = 10  # steps of non-finite loss in a row that end a training
DEFAULTS = TrainConfig()


@dataclass(frozen=True)
class StepReport:
    """What happened in a step, 1 … steps. loss: nan if it was passed over. validation_loss: where made."""

    step: int
    loss: float
    learning_rate: float
    validation_loss: float | None
    best_loss: float


class Training:
    """A training that can be advanced step by step, saved and resumed.

    concept: where it starts; it is not changed. images: (N, 3, H, W) float32 in [-1, 1]. templates: of each
    image, N lists of lines with a slot `{}`. keep_encoder: otherwise the model's image encoder leaves memory
    once its answers are cached, and the model cannot decode images any more. Images without anything dark, which may
    be in [0, 1], are said to be so in a warning.

    Raises InversionError for a concept, images or templates that cannot work, ModelError for a size of image.
    """

    @torch.inference_mode(False)                        # where nothing could have a gradient, here and below
    def __init__(
        self, model: Any, concept: Concept, images: Tensor, templates: Sequence[Sequence[str]],
        config: TrainConfig = DEFAULTS, keep_encoder: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(images, Tensor):
            found = type(images).__name__
            raise InversionError(f"images are a tensor (N, 3, H, W), as read_images makes it, not a {found}")
        if isinstance(templates, str):
            raise InversionError(f"templates are N lists of lines, one for every image, not {templates!r}")
        if images.ndim != 4 or not images.numel() or len(templates) != len(images):
            raise InversionError(
                f"images (N, 3, H, W) and N lists of templates are needed: got {tuple(images.shape)} and "
                f"{len(templates)}"
            )
        if images.shape[1] != 3 or not images.is_floating_point() or not images.abs().max() <= 1:
            raise InversionError(
                f"images must be floats in [-1, 1] with 3 channels; these are {images.dtype} {tuple(images.shape)}, "
                f"from {images.min().item():g} to {images.max().item():g}"
            )
        if 0 <= images.min() < images.max():
            warnings.warn(
                "no pixel of the images is darker than middle grey; they are to be in [-1, 1]: if these are in [0, 1], "
                "give 2 * images - 1", UserWarning, stacklevel=3,
            )  # fmt: skip
        concept.require_fit(model.width, model.family)
        check_prompts(model.tokenizer, concept, templates)
        self.model, self.concept, self.templates, self.config = model, concept, templates, config
        self.schedule, self.shape = Schedule(**model.schedule), model.x0_shape(*images.shape[2:])
        freeze(model)
        self.images_hash, self.weights_hash = digest(images), digest(str(_ends_of_weights(model)))
        self.moments = torch.cat([model.moments(image[None].to(model.device)).cpu() for image in images])
        if not keep_encoder:
            model.release_encoder()
        self.validation = Validation(
            model, self.schedule, self.moments, templates, self.shape,
            config.validation_pairs, config.batch_size,
        )  # fmt: skip
        text = [runs_in(model.text)] if hasattr(model, "text") else []      # which may be a file's own, another dtype
        self.state = State.start(concept.vectors, first_scale(model.dtype, *text))

    def steps(self) -> Iterator[StepReport]:
        """Advance to the last step, or until patience ends. `state` is whole whenever this is interrupted.

        Raises InversionError when the loss is not finite at the start or `NON_FINITE` times in a row, and
        when a vector has not moved after `MOVED_BY` updates.
        """
        if not self.state.history:
            state = self._validated(self.state)
            if math.isinf(state.best_loss):
                raise InversionError(f"the loss is not finite before the first step: {self._precision()}")
            self.state = state
        while self.state.step < self.config.steps and not self._settled():
            yield self._advance()

    def best(self) -> Concept:
        """The word as it was when its validation loss was lowest, its metadata telling how it was made."""
        model, config, state = self.model, self.config, self.state
        norms, cosines = (", ".join(f"{x:.4f}" for x in values) for values in self._moved(state.best))
        said = {"family": model.family, "source": model.source, "prediction": model.prediction}
        said |= {"steps": state.best_step, "validation_loss": state.best_loss, "images": len(self.moments)}
        said |= {"learning_rate": config.learning_rate, "seed": config.seed}
        said |= {"batch_size": config.batch_size * config.accumulation}
        said |= {"norms": norms, "cosines_to_init": cosines}
        metadata = self.concept.metadata | {key: str(value) for key, value in said.items()}
        return Concept(self.concept.placeholder, state.best.clone(), metadata)

    def save(self, path: str | Path) -> None:
        """Write the state, atomically."""
        self.state.save(as_path(path), self._run())

    def resume(self, path: str | Path) -> None:
        """Continue from a file of `save`. Raises InversionError for another run's, and for a damaged one."""
        self.state = State.load(as_path(path), self._run(), self.concept.vectors.shape)

    @torch.inference_mode(False)
    def _advance(self) -> StepReport:
        started, state, rate = time.perf_counter(), self.state, self.config.rate(self.state.step)
        loss, gradient = self._gradient(state)
        norm = gradient.norm().item()                     # not finite, too, of numbers beyond 1e19
        finite = math.isfinite(norm) and math.isfinite(loss)
        clipped = gradient * min(1.0, self.config.clip_norm / max(norm, 1e-12))
        moved = state.updated(clipped, rate, loss) if finite else state
        finite = finite and bool(torch.isfinite(moved.vectors).all())     # a rate can be too large for float32
        state = moved if finite else state.passed_over()
        due = state.step % self.config.validate_every == 0 or state.step == self.config.steps
        if due:
            state = self._validated(state)
        self.state = replace(state, seconds=state.seconds + time.perf_counter() - started)
        if finite and state.updates >= min(MOVED_BY, self.config.steps):
            self._require_movement(gradient)
        if state.in_a_row >= NON_FINITE:
            raise InversionError(
                f"the loss, or what it makes of the vectors, was not finite in {NON_FINITE} steps in a row, to step "
                f"{state.step}: "
                f"{self._precision()}; the best vectors so far, of step {state.best_step}, are kept"
            )
        validation_loss = state.history[-1]["validation_loss"] if due else None
        return StepReport(state.step, state.losses[-1], rate, validation_loss, state.best_loss)

    def _gradient(self, state: State) -> tuple[float, Tensor]:
        """The mean loss of this step's samples, and its gradient (n, D) float32."""
        vectors = state.vectors.clone().requires_grad_()
        concept, batch = Concept(self.concept.placeholder, vectors), self._batch(state.step)
        total, gradient, scale = 0.0, torch.zeros_like(state.vectors), state.scale or 1.0
        for part in batch.parts(self.config.batch_size):
            loss, piece = loss_and_gradient(self.model, self.schedule, part, concept, len(batch), scale)
            total, gradient = total + loss.item(), gradient + piece
        return total, gradient

    def _batch(self, step: int) -> Batch:
        """Samples of a step: each image as often as any other, as nearly as the size allows."""
        size, count = self.config.batch_size * self.config.accumulation, len(self.moments)
        generator = step_generator(self.config.seed, step)
        rounds = [torch.randperm(count, generator=generator, device="cpu") for _ in range(-(-size // count))]
        which, choice = torch.cat(rounds)[:size], torch.randint(2**31, (size,), generator=generator, device="cpu")
        return random_batch(self.moments, self.templates, which, choice, self.shape, self.schedule.steps, generator)

    def _validated(self, state: State) -> State:
        word = self.concept.placeholder
        loss = self.validation.loss(word, Concept(word, state.vectors))
        since = state.history[-1]["step"] if state.history else 0
        recent = [value for value in state.losses[since:] if not math.isnan(value)]
        mean, (norms, cosines) = sum(recent) / len(recent) if recent else None, self._moved(state.vectors)
        row = {"step": state.step, "loss": mean, "validation_loss": loss if math.isfinite(loss) else None}
        return state.validated(loss, row | {"norms": norms, "cosines": cosines})

    def _settled(self) -> bool:
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def _moved(self, vectors: Tensor) -> tuple[list[float], list[float]]:
        """Each vector's norm, and its cosine to where it started."""
        cosines = F.cosine_similarity(vectors, self.concept.vectors.cpu(), dim=1)  # (n,)
        return vectors.norm(dim=1).tolist(), cosines.tolist()

    def _require_movement(self, gradient: Tensor) -> None:
        still = (self.state.vectors == self.concept.vectors.cpu()).all(dim=1)
        if still.any():
            which = ", ".join(str(i + 1) for i in still.nonzero().flatten().tolist())
            silent = bool((gradient[still] == 0).all())
            reason = (
                "their gradient is zero, so the networks do not see them: check the model and the templates"
                if silent else "the learning rate is too small for float32: raise it"
            )  # fmt: skip
            raise InversionError(
                f"nothing was learned in {self.state.updates} steps: of the {len(still)} vectors of "
                f"{self.concept.placeholder}, number {which} did not move; {reason}"
            )

    def _precision(self) -> str:
        return (
            f"lower the learning rate ({self.config.learning_rate:g}), or run the networks in bfloat16 or "
            "float32 if they run in float16"
        )

    def _run(self) -> dict[str, Any]:
        """What must be equal for a training to be continued."""
        run = asdict(self.config) | {"placeholder": self.concept.placeholder, "family": self.model.family}
        run |= {"images": self.images_hash, "initial vectors": digest(self.concept.vectors)}
        run |= {"templates": digest(str([list(lines) for lines in self.templates])), "dtype": str(self.model.dtype)}
        said = f"{self.model.prediction} {sorted(self.model.schedule.items())} {self.weights_hash}"
        return run | {"model": digest(said)}


def freeze(model: Any) -> None:
    """No weight of the model learns, and its layers behave as in use."""
    for part in vars(model).values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def _ends_of_weights(model: Any) -> list[float]:
    """The first and the last number of every weight, as the model's dtype has it, in whichever its weights wait.

    Another model has others, one whose autoencoder or text transformer was exchanged, or into which a LoRA was merged.
    """
    networks = [part for part in vars(model).values() if isinstance(part, nn.Module)]
    weights = [p.detach() for part in networks for p in part.parameters() if p.numel() and not p.is_meta]
    return [weight[(end,) * weight.ndim].to(model.dtype).item() for weight in weights for end in (0, -1)]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def digest(content: Tensor | str) -> str:
    """Sixteen letters that tell a tensor's numbers, or a text, from others."""
    found = hashlib.sha256(content.encode() if isinstance(content, str) else b"")
    for some in () if isinstance(content, str) else content.detach().flatten().split(2**20):      # many images are much
        found.update(some.cpu().double().numpy())
    return found.hexdigest()[:16]
