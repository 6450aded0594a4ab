import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import ModelError
from models.files import as_path, find_weights, metadata, open_tensors, tensor_names
from models.pickles import Inert, read_pickle

Read = Callable[[Path], Any]

FIXTURES = Path(__file__).parents[1] / "fixtures"
STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def assert_holds_state(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == STATE.keys()
    assert all(
        torch.equal(tensors[key], STATE[key]) and tensors[key].dtype == STATE[key].dtype for key in STATE
    )


class Malice:
    """Unpickled by the ordinary reader, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self.path, 0o777, True)


class Losses(list):
    """A list of a trainer's own."""


class Options(dict):
    """And a dictionary."""


class OldTensor:
    """A tensor as torch wrote it before 0.4."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        t = self.tensor
        storage = torch.storage.TypedStorage(wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True)
        return torch._utils._rebuild_tensor, (storage, t.storage_offset(), tuple(t.shape), t.stride())


class TestPickles:
    def test_a_checkpoint_that_names_foreign_classes(self) -> None:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(FIXTURES / "lightning_style.ckpt", weights_only=True)
        tensors = open_tensors(FIXTURES / "lightning_style.ckpt")
        assert tensors["model.diffusion_model.out.2.bias"].tolist() == [0, 1, 2, 3]
        assert tensors["betas"].shape == (1000,)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_nothing_in_a_file_is_run(self, tmp_path: Path, zipped: bool) -> None:
        file, made = tmp_path / "evil.ckpt", tmp_path / "made"
        content = {"state_dict": STATE | {"x": Malice(made)}, "hooks": [Malice(made)], Malice: Malice(made)}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        assert_holds_state(open_tensors(file))
        assert not made.exists()
        torch.load(file, weights_only=False)
        assert made.exists()  # the file was a danger indeed

    @pytest.mark.parametrize(
        "opcode", [b"cos\nmkdir\n", b"ctorch\nload\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n"]
    )
    def test_no_name_reaches_a_function(self, tmp_path: Path, opcode: bytes) -> None:
        made = tmp_path / "made"
        text = pickle.dumps(str(made), 2)[2:-1]
        torch.save(STATE, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
        legacy = (tmp_path / "file.pt").read_bytes()
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        assert legacy.startswith(magic)
        (tmp_path / "file.pt").write_bytes(magic + b"\x80\x02" + opcode + text + b"\x85R.")
        with pytest.raises(ModelError):
            read_pickle(tmp_path / "file.pt")
        assert not made.exists()

    def test_torchs_own_functions_cannot_be_altered(self, tmp_path: Path) -> None:
        before = torch._utils._rebuild_tensor_v2.__defaults__
        set_state = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__Nstb."
        torch.save(STATE, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
        (tmp_path / "file.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + set_state)
        with pytest.raises(ModelError):
            read_pickle(tmp_path / "file.pt")
        assert torch._utils._rebuild_tensor_v2.__defaults__ == before

    def test_what_a_file_says_of_them_is_forgotten_with_it(self, tmp_path: Path) -> None:
        """Of another class, they would rebuild no tensor of any later file."""
        set_class = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x09\x00\x00\x00__class__cany\nthing\ns\x86b."
        torch.save(STATE, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
        whole = (tmp_path / "file.pt").read_bytes()
        (tmp_path / "file.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + set_class)
        with pytest.raises(ModelError):
            read_pickle(tmp_path / "file.pt")
        (tmp_path / "file.pt").write_bytes(whole)
        assert_holds_state(open_tensors(tmp_path / "file.pt"))

    @pytest.mark.parametrize("zipped", [True, False])
    def test_tensors_of_a_gpu_come_to_the_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
    ) -> None:
        """What was saved there says so; elsewhere torch refuses it unless it is told where to put it."""
        with monkeypatch.context() as saving:
            saving.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
            torch.save(STATE, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        tensors = open_tensors(tmp_path / "file.pt")
        assert_holds_state(tensors)
        assert all(t.device.type == "cpu" for t in tensors.values())

    def test_unknown_objects_keep_their_state_and_do_nothing(self, tmp_path: Path) -> None:
        parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(3))})
        torch.save({"string_to_param": parameters, "path": Path("x")}, tmp_path / "file.pt")
        content = read_pickle(tmp_path / "file.pt")
        assert isinstance(content["path"], Inert)
        assert content["string_to_param"].state["_parameters"]["*"].tolist() == [1, 1, 1]

    def test_foreign_lists_and_dictionaries_are_filled_and_forgotten(self, tmp_path: Path) -> None:
        content = {"state_dict": STATE, "losses": Losses([0.5, 0.25]), "options": Options(rate=1e-4, steps=10)}
        torch.save(content, tmp_path / "file.ckpt")
        assert_holds_state(open_tensors(tmp_path / "file.ckpt"))
        found = read_pickle(tmp_path / "file.ckpt")
        assert all(isinstance(found[name], Inert) for name in ("losses", "options"))

    def test_tensors_of_the_oldest_torch(self, tmp_path: Path) -> None:
        torch.save({key: OldTensor(t) for key, t in STATE.items()}, tmp_path / "old.pt")
        assert_holds_state(open_tensors(tmp_path / "old.pt"))

    def test_the_oldest_container(self, tmp_path: Path) -> None:
        torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        assert_holds_state(open_tensors(tmp_path / "old.bin"))

    def test_parameters_come_as_plain_tensors(self, tmp_path: Path) -> None:
        torch.save({key: torch.nn.Parameter(t) for key, t in STATE.items()}, tmp_path / "file.pt")
        tensors = open_tensors(tmp_path / "file.pt")
        assert_holds_state(tensors)
        assert not any(t.requires_grad for t in tensors.values())

    def test_a_program_is_refused(self, tmp_path: Path) -> None:
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
        with pytest.raises(ModelError, match=rf"^{tmp_path}/program\.pt is a TorchScript program"):
            read_pickle(tmp_path / "program.pt")

    def test_names_that_are_no_text_become_it(self, tmp_path: Path) -> None:
        torch.save({0: torch.zeros(1), "a": torch.ones(1)}, tmp_path / "file.pt")
        assert open_tensors(tmp_path / "file.pt").keys() == tensor_names(tmp_path / "file.pt") == {"0", "a"}

    def test_other_things_than_tensors_by_name(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(ModelError, match="holds a list"):
            open_tensors(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_files_are_mapped(tmp_path: Path, lies_in: Callable[[torch.Tensor, Path], bool], name: str) -> None:
    file = tmp_path / name
    save_file(STATE, file) if name == "a.safetensors" else torch.save(STATE, file)
    tensors = open_tensors(file)
    assert_holds_state(tensors)
    assert all(lies_in(tensor, file) for tensor in tensors.values())
    assert open_tensors(file, only={"a", "c"}).keys() == {"a"}


@pytest.mark.parametrize("read", [open_tensors, tensor_names])
class TestUnreadable:
    def test_missing(self, read: Read, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="there is no file"):
            read(tmp_path / "no.safetensors")

    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
    def test_empty(self, read: Read, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(ModelError, match="is empty"):
            read(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin"])
    def test_git_lfs_pointer(self, read: Read, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n"
        )
        with pytest.raises(ModelError, match="git-lfs pointer.*git lfs pull"):
            read(tmp_path / name)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "old.ckpt"])
    def test_truncated(self, read: Read, tmp_path: Path, name: str, share: float) -> None:
        state = {"a": torch.ones(2000)}
        if name == "a.safetensors":
            save_file(state, tmp_path / name)
        else:
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "a.ckpt")
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ModelError, match=r"truncated|does not hold"):
            read(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
    def test_something_else(self, read: Read, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("GGUF, or whatever else there is that is long enough to hold a header")
        begins = r"not a PyTorch file: it begins with b.GG.*\.ckpt"
        said = "truncated or damaged" if name == "a.safetensors" else begins
        with pytest.raises(ModelError, match=said):
            read(tmp_path / name)


    @pytest.mark.parametrize("page", ["<html>404", "\n<!DOCTYPE html>\n<html>log in"])
    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
    def test_a_web_page(self, read: Read, tmp_path: Path, name: str, page: str) -> None:
        (tmp_path / name).write_text(page)
        with pytest.raises(ModelError, match=f"{name} is a web page: download the file itself"):
            read(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors.crdownload", "a"])
    @pytest.mark.parametrize("zipped", [None, True, False])
    def test_a_wrong_ending_is_none_the_worse(self, read: Read, tmp_path: Path, name: str, zipped: bool | None) -> None:
        state = {"a": torch.ones(3)}
        if zipped is None:
            save_file(state, tmp_path / name, {"said": "so"})
        else:
            torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert set(read(tmp_path / name)) == {"a"}
        assert metadata(tmp_path / name) == ({"said": "so"} if zipped is None else {})

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_that_is_called_safetensors(self, read: Read, tmp_path: Path, zipped: bool) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.safetensors", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelError, match=r"is a PyTorch file and no \.safetensors one: rename it to a\.ckpt"):
            read(tmp_path / "a.safetensors")


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/x") == as_path(Path("~/x")) == tmp_path / "x"
    assert as_path("x~/~") == Path("x~/~")


class TestFinding:
    def put(self, folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).touch()

    def found(self, folder: Path, variant: str | None = None) -> list[str]:
        return [file.name for file in find_weights(folder, ("model", "pytorch_model"), variant).files]

    def test_safetensors_come_before_bin(self, tmp_path: Path) -> None:
        self.put(tmp_path, "pytorch_model.bin", "model.fp16.safetensors")
        assert self.found(tmp_path) == ["pytorch_model.bin"]
        self.put(tmp_path, "model.safetensors")
        assert self.found(tmp_path) == ["model.safetensors"]

    def test_a_variant_is_asked_for(self, tmp_path: Path) -> None:
        self.put(tmp_path, "model.safetensors", "model.fp16.safetensors", "pytorch_model.fp16.bin")
        assert self.found(tmp_path, "fp16") == ["model.fp16.safetensors"]
        (tmp_path / "model.fp16.safetensors").unlink()
        assert self.found(tmp_path, "fp16") == ["pytorch_model.fp16.bin"]

    def test_the_variants_there_are_are_named(self, tmp_path: Path) -> None:
        self.put(
            tmp_path, "model.fp16.safetensors", "model.ema.safetensors", "model.safetensors.index.bf16.json"
        )
        with pytest.raises(ModelError, match="variant='bf16', variant='ema', variant='fp16'"):
            self.found(tmp_path)
        self.put(tmp_path, "model.safetensors")
        with pytest.raises(ModelError, match=r"none of model\.x\.safetensors.*it does hold no variant"):
            self.found(tmp_path, "x")

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_shards(self, tmp_path: Path, variant: str | None) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for (key, tensor), name in zip(STATE.items(), names):
            save_file({key: tensor}, tmp_path / name)
        dot = ".fp16" if variant else ""
        index = {"metadata": {}, "weight_map": dict(zip(STATE, names))}
        (tmp_path / f"model.safetensors.index{dot}.json").write_text(json.dumps(index))
        assert self.found(tmp_path, variant) == names
        weights = find_weights(tmp_path, ("model",), variant)
        assert_holds_state(weights.open())
        assert str(weights) == str(tmp_path)                            # what an error calls them: no shard is wrong
        (tmp_path / names[1]).unlink()
        with pytest.raises(ModelError, match=f"lacks the shard {names[1]}"):
            self.found(tmp_path, variant)

    @pytest.mark.parametrize("shard", ["../x.safetensors", "a/x", "a\\x", "/etc/passwd", "..", ".", ""])
    def test_a_shard_stays_in_its_folder(self, tmp_path: Path, shard: str) -> None:
        save_file(STATE, tmp_path.parent / "x.safetensors")  # there to be read, and not to be
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ModelError, match="a shard is a bare file name"):
            self.found(tmp_path)

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3, "b": ""}}']
    )
    def test_an_index_that_is_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match="not an index"):
            self.found(tmp_path)
