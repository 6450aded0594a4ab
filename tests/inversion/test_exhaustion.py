"""A device that runs out of memory in the middle: the vectors so far are kept, and what would need less is named."""

import errno
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from inversion import InversionError, plan
from inversion.exhaustion import advice, is_out_of_memory, next_cheaper
from inversion.trainer import state_file
from models import LatentModel, Setting, outline
from models.setting import place
from tests.inversion.test_training import FAST, learn, same
from tests.tiny import tiny_model

SAID = "CUDA out of memory. Tried to allocate 20.00 MiB"
FORMS = [
    torch.OutOfMemoryError(SAID), RuntimeError(SAID), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("could not create a primitive"), OSError(errno.ENOMEM, "Cannot allocate memory", "a library"),
    RuntimeError("unable to mmap 24375616 bytes from file <x.safetensors>: Cannot allocate memory (12)"),
    ImportError("_lsprof.so: failed to map segment from shared object"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]  # fmt: skip


def exhausted(at: int, error: Exception) -> LatentModel:
    """A tiny model whose call number `at` of the UNet finds no memory."""
    model, calls = tiny_model(), []
    answer = model.unet.forward

    def forward(*args: Any, **how: Any) -> Tensor:
        calls.append(None)
        if len(calls) == at:
            raise error
        return answer(*args, **how)

    model.unet.forward = forward
    return model


def test_other_errors_are_no_exhaustion() -> None:
    on_windows = RuntimeError("[enforce fail at alloc_cpu.cpp] data. DefaultCPUAllocator: not enough memory: you tried")
    assert all(map(is_out_of_memory, [*FORMS, on_windows]))
    shapes = RuntimeError("could not create a primitive descriptor for the matmul primitive"), ImportError("no module")
    assert not any(map(is_out_of_memory, [*shapes, ValueError(SAID), KeyError("x"), OSError(errno.ENOSPC, SAID)]))


@pytest.mark.parametrize("error", FORMS, ids=lambda error: type(error).__name__)
def test_the_vectors_are_saved_and_the_next_cheaper_setting_is_named(tmp_path: Path, error: Exception) -> None:
    file = tmp_path / "x.safetensors"
    message = (
        "cpu ran out of memory with float32, checkpointing none, attention auto, offload none: the next cheaper "
        "setting is checkpointing attention, offload none; the vectors so far are saved"
    )
    with pytest.raises(InversionError, match=message) as raised:
        learn(exhausted(8, error), file=file)
    assert raised.value.__cause__ is error
    assert state_file(file).exists()
    cheaper = tiny_model()
    cheaper.checkpointing = "attention"
    same(learn(cheaper, file=file, resume=True), learn(tiny_model()))


def test_what_was_computed_is_let_go_though_the_error_is_kept() -> None:
    """As a notebook keeps it, where the next try would find no memory either."""
    model, held = tiny_model(), []

    def within() -> None:
        more = torch.ones(1000)
        held.append(weakref.ref(more))
        raise RuntimeError(SAID)

    def forward(*_: Any, **__: Any) -> Tensor:
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        try:
            within()
        except RuntimeError as error:
            raise torch.OutOfMemoryError(SAID) from error

    model.unet.forward = forward
    with pytest.raises(InversionError, match="ran out of memory") as kept:
        learn(model)
    assert kept.value.__cause__.__cause__ is not None
    assert [each() for each in held] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_on_a_gpu_float16_is_named_where_float32_was_too_much(device: str, dtype: torch.dtype) -> None:
    model = SimpleNamespace(device=torch.device(device), dtype=dtype, setting=Setting(dtype))
    said = "; dtype float16 takes half the memory" in advice(model, 512, 1)
    assert said == ((device, dtype) == ("cuda", torch.float32))


def test_what_needs_as_much_is_not_named() -> None:
    """Of Stable Diffusion 1.5 at batch 1 it is the encoding of the image that takes the most, at every level."""
    model = outline("sd1.5")
    for network in (model.unet, model.vae, model.text):
        network.half()
    cheaper = next_cheaper(model, 512, 1)
    peaks = [planned.peak for planned in plan(model, 512, 1, "cuda", [model.setting, cheaper])]
    assert cheaper.offload == "idle"
    assert peaks[1] < peaks[0]
    assert next_cheaper(model, 512, 4).checkpointing == "attention"         # there the step is the larger


def test_what_is_too_large_to_be_planned_gets_the_next_level() -> None:
    assert next_cheaper(outline("sd1.5"), 8192, 1).checkpointing == "attention"


@pytest.mark.parametrize(
    "error", [MemoryError(), ImportError("half of torch"), SystemError("error return without exception set")], ids=repr
)
def test_where_no_memory_is_left_to_plan_in_the_next_level_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def one_by_one(*given: Any) -> None:
        raise error

    monkeypatch.setattr("inversion.exhaustion.one_by_one", one_by_one)
    with pytest.raises(InversionError, match="is checkpointing attention, offload none; the vectors so far are saved"):
        learn(exhausted(8, MemoryError()), file=tmp_path / "x.safetensors")


def test_where_nothing_is_cheaper_it_says_so() -> None:
    model = exhausted(5, MemoryError())
    place(model, Setting(torch.float32, "blocks", offload="stream"), torch.device("cpu"))
    with pytest.raises(InversionError, match="nothing needs less but a smaller resolution or batch$"):
        learn(model, replace(FAST, steps=4))


def test_before_the_first_step_nothing_is_there_to_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="offload none$"):
        learn(exhausted(1, MemoryError()), file=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_an_older_run_saved_is_not_claimed(tmp_path: Path) -> None:
    model, file = exhausted(1, MemoryError()), tmp_path / "x.safetensors"
    state_file(file).write_text("an older run's")
    place(model, Setting(torch.float32, "blocks", offload="stream"), torch.device("cpu"))     # without a plan
    with pytest.raises(InversionError, match="nothing needs less but a smaller resolution or batch$"):
        learn(model, file=file)
    assert state_file(file).read_text() == "an older run's"


def test_what_was_to_be_resumed_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the images that are encoded again find no memory, nothing is written."""
    file, model = tmp_path / "x.safetensors", tiny_model()
    learn(tiny_model(), replace(FAST, steps=1), file=file)
    place(model, Setting(torch.float32, "blocks", offload="stream"), torch.device("cpu"))     # without a plan

    def moments(*args: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(LatentModel, "moments", moments)
    with pytest.raises(InversionError, match=r"the vectors so far are saved, .*x\.training\.pt can be resumed from$"):
        learn(model, replace(FAST, steps=1), file=file, resume=True)
