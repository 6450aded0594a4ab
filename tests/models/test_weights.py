from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import ModelError, presets
from models.files import Weights, metadata, open_tensors
from models.renaming import LAYOUTS
from models.text import ClipText
from models.vae import VAE
from models.weights import (
    Part,
    best_layout,
    choose_dtype,
    fill,
    gather,
    on_meta,
    write_safetensors,
)
from tests.disk import full_disk

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYOUT = LAYOUTS["text"]["diffusers"]
KEY = "text_model.encoder.layers.0.mlp.fc1.weight"


def text() -> ClipText:
    return ClipText(presets.TINY.text)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[ClipText, dict[str, Tensor], Path]:
    network = text()
    tensors = gather(Part(network, LAYOUT))
    save_file(tensors, tmp_path / "model.safetensors")
    return network, tensors, tmp_path / "model.safetensors"


def read(path: Path, dtype: torch.dtype | str | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    network = on_meta(text)
    return network, fill([Part(network, LAYOUT)], Weights((path,)), dtype, CPU)


def test_a_network_on_the_meta_device_has_no_numbers() -> None:
    network = on_meta(text)
    assert all(p.is_meta and not p.requires_grad for p in network.parameters())
    assert not network.training


def test_parameters_are_the_file_itself(
    saved: tuple[ClipText, dict[str, Tensor], Path], lies_in: Callable[[Tensor, Path], bool]
) -> None:
    network, kept = read(saved[2])
    assert kept == {}
    for name, parameter in network.named_parameters():
        assert lies_in(parameter, saved[2]), name
        assert torch.equal(parameter, saved[0].state_dict()[name])
        assert not parameter.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion(saved: tuple[ClipText, dict[str, Tensor], Path], dtype: torch.dtype) -> None:
    network, _ = read(saved[2], dtype)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, saved[0].state_dict()[name].to(dtype)), name


@pytest.mark.parametrize("at_once", [1, 1000])
def test_conversion_of_a_model_in_many_batches(
    saved: tuple[ClipText, dict[str, Tensor], Path], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """The last of which may be full, or not."""
    monkeypatch.setattr("models.weights.AT_ONCE", at_once)
    network, _ = read(saved[2], torch.bfloat16)
    assert all(torch.equal(p, saved[0].state_dict()[n].bfloat16()) for n, p in network.named_parameters())


def test_published_but_unused_tensors_are_kept(saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
    extra = {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    save_file(saved[1] | extra, saved[2])
    _, kept = read(saved[2])
    assert kept.keys() == extra.keys()
    assert torch.equal(kept["text_model.embeddings.position_ids"], torch.arange(32)[None])


class TestStrictness:
    def refused(self, tensors: dict[str, Tensor], path: Path) -> str:
        save_file(tensors, path)
        with pytest.raises(ModelError) as error:
            read(path)
        assert str(path) in str(error.value)
        return str(error.value)

    def test_a_missing_tensor_is_named(self, saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
        del saved[1][KEY]
        assert f"{KEY} (64, 32) is missing" in self.refused(saved[1], saved[2])

    def test_an_unknown_tensor_is_named(self, saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
        said = self.refused(saved[1] | {"text_model.head.weight": torch.ones(3, 2)}, saved[2])
        assert "text_model.head.weight (3, 2) is not known" in said

    @pytest.mark.parametrize("shape", [(64, 33), (32, 64), (64, 32, 1, 1)])
    def test_both_shapes_are_named(
        self, saved: tuple[ClipText, dict[str, Tensor], Path], shape: tuple[int, ...]
    ) -> None:
        said = self.refused(saved[1] | {KEY: torch.ones(shape)}, saved[2])
        assert f"{KEY} {shape}, expected (64, 32) is of another shape" in said

    def test_everything_wrong_is_one_error(self, saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
        del saved[1][KEY]
        wrong = {"x": torch.ones(1), "text_model.final_layer_norm.bias": torch.ones(5)}
        said = self.refused(saved[1] | wrong, saved[2])
        assert all(word in said for word in (KEY, "x (1,)", "text_model.final_layer_norm.bias (5,)", "(32,)"))

    def test_a_long_list_is_cut(self, saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
        said = self.refused({"x": torch.ones(1)}, saved[2])
        assert f"and {len(saved[1]) - 8} more are missing" in said
        said = self.refused(saved[1] | {f"x{i}": torch.ones(1) for i in range(8)}, saved[2])
        assert "x7 (1,) are not known" in said                          # eight are told of, and of no more

    def test_integers_are_no_weights(self, saved: tuple[ClipText, dict[str, Tensor], Path]) -> None:
        said = self.refused(saved[1] | {KEY: torch.ones(64, 32, dtype=torch.int8)}, saved[2])
        assert f"{KEY} torch.int8 is of another dtype than float16, " in said


def test_the_layout_of_a_file_is_recognised() -> None:
    for role, make in (("text", text), ("vae", lambda: VAE(presets.TINY.vae))):
        network = make()
        for name, layout in LAYOUTS[role].items():
            parts = {other: Part(on_meta(make), how) for other, how in LAYOUTS[role].items()}
            assert best_layout(parts, gather(Part(network, layout))) == name


class TestDtype:
    def test_none_is_the_files_own(self) -> None:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            assert choose_dtype(None, dtype, CPU) == dtype
        assert choose_dtype(None, torch.float16, GPU) == torch.float16

    def test_float16_becomes_float32_on_a_cpu(self) -> None:
        assert choose_dtype(None, torch.float16, CPU) == torch.float32

    @pytest.mark.parametrize(("fast", "instead"), [(True, "use bfloat16"), (False, "use float32")])
    def test_float16_asked_for_on_a_cpu(
        self, monkeypatch: pytest.MonkeyPatch, fast: bool, instead: str
    ) -> None:
        monkeypatch.setattr("models.weights.cpu_has_bfloat16", lambda: fast)
        with pytest.raises(ModelError, match=f"hundreds of times slower.*{instead}"):
            choose_dtype(torch.float16, torch.float32, CPU)
        assert choose_dtype(torch.float16, torch.float32, GPU) == torch.float16

    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr("models.weights.cpu_has_bfloat16", lambda fast=fast: fast)
            assert choose_dtype("auto", torch.float32, CPU) == dtype
        assert choose_dtype("auto", torch.float32, GPU) == torch.float16

    def test_a_name_is_as_good_as_the_dtype(self) -> None:
        assert choose_dtype("bfloat16", torch.float32, torch.device("cpu")) == torch.bfloat16
        with pytest.raises(ModelError, match="float16 on a CPU"):
            choose_dtype("float16", torch.float32, torch.device("cpu"))

    @pytest.mark.parametrize("wanted", [torch.int8, "float8", 16])
    def test_others_are_refused(self, wanted: object) -> None:
        with pytest.raises(ModelError, match="'auto'"):
            choose_dtype(wanted, torch.float32, CPU)


def test_a_dtype_that_is_asked_for_goes_before_that_of_a_network_that_waits() -> None:
    network = text()
    network.runs_in = torch.bfloat16
    for asked, wanted in ((torch.float64, torch.float64), (None, torch.bfloat16)):
        assert {t.dtype for t in gather(Part(network, LAYOUT), asked).values()} == {wanted}


def test_a_written_file_says_that_it_is_of_torch(tmp_path: Path) -> None:
    """transformers 4 refuses metadata that do not."""
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"of": "ours"})
    assert metadata(tmp_path / "x.safetensors") == {"format": "pt", "of": "ours"}


def test_a_written_file_has_the_permissions_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    with full_disk(), pytest.raises(OSError, match=r"x\.safetensors cannot be written"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(10_000)})
    assert torch.equal(open_tensors(tmp_path / "x.safetensors")["a"], torch.ones(1))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
