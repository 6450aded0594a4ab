"""`scripts/compare_starts.py` over a tiny GLIDE: three starts, each seed's own training, one validation set."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import models
from inversion import Concept, InversionError, Result
from models.glide import GlideModel
from models.unet_model import Sampling
from tests.tiny import tiny_glide

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_starts.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("compare_starts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.save(tiny_glide(), tmp_path / "base.safetensors")
    (tmp_path / "photos").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("flag", ["picture", "output"])
def test_what_cannot_be_written_is_not_trained_for(script: ModuleType, folder: Path, flag: str) -> None:
    with pytest.raises(InversionError, match=f"--{flag} .* is a folder: name a file"):
        script.main(script.Config(str(folder / "no model"), folder / "photos", **{flag: folder}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"samples": 0, "picture": Path("x.png")}, "--samples is how many columns the picture has, at least 1, not 0"),
        ({"phrase": "dog"}, "--phrase dog is the word itself"),
    ],
)
def test_what_cannot_be_compared_is_not_trained_for(script: ModuleType, folder: Path, flags: dict, said: str) -> None:
    with pytest.raises(InversionError, match=said):
        script.main(script.Config(str(folder / "no model"), folder / "photos", **flags))


def test_three_starts_are_compared_on_one_set(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(script, "comparison", lambda file, rows, columns: drawn.extend(rows))
    monkeypatch.setattr(script, "COPIES", 3)
    monkeypatch.setattr(GlideModel, "sampling", Sampling("ddpm", "4", 3.0))     # its own 100 steps take a while
    script.main(
        script.Config(
            str(folder), folder / "photos", "<x>", "cat", phrase="large white dog", seeds=(0, 5), steps=3, samples=2,
            output=folder / "found.json", picture=folder / "x.png",
        )
    )  # fmt: skip
    found = json.loads((folder / "found.json").read_text())
    assert list(found) == ["“dog”", "3 × “dog”", "“large white dog”"]
    first = {label: {run["validation_loss_initial"] for run in runs} for label, runs in found.items()}
    assert all(len(several) == 1 for several in first.values())      # no seed has a validation set of its own
    captions = {run["validation_loss_caption"] for runs in found.values() for run in runs}
    assert len(captions) == 1
    one = [run["validation_loss_best"] for run in found["“dog”"]]
    assert one[0] != one[1]                                           # but each its own training
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("”")[-1].split()[0] for line in lines[1:4]] == ["1", "3", "3"]
    assert f"{one[0]:.4f}  {one[1]:.4f}" in lines[1]
    assert [label for label, _ in drawn][1] == "before: a photo of dog"
    assert len(drawn) == 5


def test_an_interrupted_comparison_leaves_the_numbers_that_it_had(
    script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*given: object, **how: object) -> Result:
        runs.append(given)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return Result(Concept("<x>", torch.zeros(1, 4)), {"validation_loss_best": float(len(runs))}, ())

    runs, file = [], folder / "found.json"
    monkeypatch.setattr(script.inversion, "train", train)
    with pytest.raises(KeyboardInterrupt):
        script.main(script.Config(str(folder), folder / "photos", "<x>", "cat", seeds=(0, 5), output=file))
    assert json.loads(file.read_text()) == {"“dog”": [{"validation_loss_best": 1.0}, {"validation_loss_best": 2.0}]}


def test_the_table_says_what_the_best_gained(script: ModuleType) -> None:
    def result(best: float) -> Result:
        metrics = {"validation_loss_initial": 0.5, "validation_loss_best": best}
        return Result(Concept("<x>", torch.zeros(2, 4)), metrics, ())

    lines = script.table({"“dog”": [result(0.4), result(0.3)]})
    assert lines[1].split() == ["“dog”", "2", "0.5000", "0.4000", "0.3000", "-30.0%"]


def test_there_must_be_a_seed(script: ModuleType, folder: Path) -> None:
    with pytest.raises(InversionError, match="at least one"):
        script.main(script.Config(str(folder), folder / "photos", seeds=()))
