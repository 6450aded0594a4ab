"""Weights that are read in another map of their file: equal numbers, and nothing of it stays."""

import gc
import json
import mmap
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.files import open_tensors
from models.mapped import Mapped, file_maps
from models.weights import write_safetensors

ROWS, COLUMNS = 1024, 1024                                      # 4 MiB: 64 times what the system maps around a read


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two matrices and, between them, a few numbers."""
    write_safetensors(tmp_path / "x.safetensors", {"a": numbers(0), "b": torch.arange(3.0), "c": numbers(1)})
    return tmp_path / "x.safetensors"


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_the_numbers_are_read_in_a_map_that_goes_with_the_tensor(path: Path) -> None:
    tensors = open_tensors(path)
    for name, wanted in (("a", numbers(0)), ("b", torch.arange(3.0)), ("c", numbers(1))):
        before, maps = resident(path), len([each for each in file_maps() if each.path == str(path)])
        weight = Mapped(nn.Parameter(tensors[name], requires_grad=False), file_maps())
        found = weight.anew()
        assert torch.equal(found, wanted)
        assert found.data_ptr() != tensors[name].data_ptr()
        assert resident(path) - before >= wanted.nbytes // 2 * (wanted.nbytes > 4096)
        del found
        gc.collect()
        assert resident(path) == before
        assert len([each for each in file_maps() if each.path == str(path)]) == maps
    assert torch.equal(tensors["a"], numbers(0))
    assert resident(path) >= 2**22                              # which is what reading the weight itself leaves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = {"x": torch.ones(3, dtype=torch.uint8), "a": numbers(2, dtype)}
    write_safetensors(tmp_path / "x.safetensors", wanted)
    torch.save(wanted, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        a = open_tensors(tmp_path / name)["a"]
        for view in (a, a[3:7], a.T, a[:, 5:9], a[5, 6]):
            found = Mapped(view, file_maps()).anew()
            assert torch.equal(found, view)
            assert found.dtype == dtype
            assert found.stride() == view.stride()
            assert found.data_ptr() != view.data_ptr()


def test_a_weight_that_begins_within_an_element_is_itself(tmp_path: Path) -> None:
    """A map is read in whole elements. Our own files have the larger ones first, others may not."""
    said = {"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [3, 19]}}  # fmt: skip
    header = json.dumps(said).encode()
    length, content = struct.pack("<Q", len(header)), struct.pack("<3B4f", 1, 2, 3, 0.5, 1, 2, 3)
    (tmp_path / "x.safetensors").write_bytes(length + header + content)
    a = open_tensors(tmp_path / "x.safetensors")["a"]
    assert a.data_ptr() % a.itemsize
    assert Mapped(a, file_maps()).anew().tolist() == [0.5, 1, 2, 3]


def test_a_weight_that_the_file_no_longer_holds_is_itself(path: Path) -> None:
    tensors = open_tensors(path)
    changed = Mapped(tensors["c"], file_maps())
    with torch.no_grad():
        tensors["c"].mul_(2)
    assert changed.anew() is tensors["c"]
    other = Mapped(nn.Parameter(tensors["b"], requires_grad=False), file_maps())
    other.weight.data = torch.zeros(3)
    assert other.anew() is other.weight
    weight = Mapped(tensors["a"], file_maps())
    write_safetensors(path.with_name("new.safetensors"), {"a": numbers(5), "b": torch.arange(3.0), "c": numbers(1)})
    os.replace(path.with_name("new.safetensors"), path)         # "replacing it by renaming is safe": models.files
    assert torch.equal(weight.anew(), numbers(0))
    path.unlink()
    assert torch.equal(weight.anew(), numbers(0))


def test_a_weight_that_was_changed_before_is_itself(path: Path) -> None:
    weight = open_tensors(path)["a"]
    weight.mul_(2)
    assert Mapped(weight, file_maps()).anew() is weight


def test_a_map_of_another_file_than_has_its_name_is_not_read(path: Path) -> None:
    """As where another folder was mounted over it."""
    weight, maps = open_tensors(path)["a"], file_maps()
    assert Mapped(weight, maps).anew() is not weight
    assert Mapped(weight, [replace(each, inode=each.inode + 1) for each in maps]).anew() is weight


def test_a_map_of_a_file_s_end(tmp_path: Path) -> None:
    """Which begins in the midst of the file, as maps do that the system has split."""
    wanted, step = torch.arange(4.0 * mmap.ALLOCATIONGRANULARITY), mmap.ALLOCATIONGRANULARITY
    (tmp_path / "x.bin").write_bytes(wanted.numpy().tobytes())
    with (tmp_path / "x.bin").open("rb") as file:
        end = mmap.mmap(file.fileno(), step, offset=2 * step, access=mmap.ACCESS_COPY)
    weight = torch.frombuffer(end, dtype=torch.float32)
    found = Mapped(weight, file_maps()).anew()
    assert found.data_ptr() != weight.data_ptr()
    assert torch.equal(found, wanted[step // 2 : 3 * step // 4])


def test_a_weight_whose_file_was_cut_short_is_itself(path: Path) -> None:
    weight = open_tensors(path)["a"]
    mapped = Mapped(weight, file_maps())
    os.truncate(path, 4096)
    itself = mapped.anew() is weight                            # not to be shown: reading what is gone ends the process
    assert itself


@pytest.mark.parametrize("name", ["with space", "ü 名", "a\x0cb c d e f g", "a\u2028b c d e f g", "x (deleted)"])
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    write_safetensors(tmp_path / name / "x.safetensors", {"a": numbers(0)})
    weight = open_tensors(tmp_path / name / "x.safetensors")["a"]
    found = Mapped(weight, file_maps()).anew()
    assert torch.equal(found, weight)
    assert found.data_ptr() != weight.data_ptr()


def test_what_lies_in_no_file_is_itself(path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    with torch.inference_mode():
        inferred = open_tensors(path)["a"]
    trained = open_tensors(path)["a"].requires_grad_()
    for weight in (numbers(0), torch.empty(0), torch.empty(3, device="meta"), fake, inferred, trained):
        assert Mapped(weight, file_maps()).anew() is weight
    mapped = open_tensors(path)["a"]
    assert Mapped(mapped, []).anew() is mapped                  # where the system does not tell of maps
