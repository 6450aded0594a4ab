"""`scripts/compare_guidance.py` over tiny networks: what is drawn, how it is judged, what the table says."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import models
from models import ModelError
from models.class_file import write_classifier
from models.class_names import ClassNames
from models.classifier import Classifier, ClassifierConfig
from models.unet import UNetConfig
from tests.scripts.test_train_networks import script
from tests.tiny import randomise, tiny_classes


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return script("compare_guidance")


def tiny_classifier(seed: int, names: tuple[str, ...] = ("dog", "cat", "owl"), size: int = 16) -> Classifier:
    torch.manual_seed(seed)
    config = UNetConfig(3, len(names), 32, (1, 2), 1, (2,), None, 16, attention="self_legacy", scale_shift=True)
    network = Classifier(ClassifierConfig(config, size), ClassNames(names))
    randomise(network)
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.save(tiny_classes(), tmp_path / "model.safetensors")
    for seed, name in enumerate(("guide", "judge")):
        write_classifier(tiny_classifier(seed), tmp_path / f"{name}.safetensors", None)
    return tmp_path


def config_of(module: ModuleType, folder: Path, **more: object) -> object:
    files = {name: str(folder / f"{name}.safetensors") for name in ("model", "guide", "judge")}
    flags = {"classifier_scales": (8, 0), "free_scales": (0, 1, 3), "count": 2, "steps": 2, "dtype": "float32"}
    return module.Config(**files | flags | {"output": folder / "out"} | more)


def test_one_command_draws_judges_and_writes(
    module: ModuleType, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    module.main(config_of(module, folder))
    rows = json.loads((folder / "out" / "guidance.json").read_text())["rows"]
    assert [(row["kind"], row["scale"]) for row in rows] == [
        ("classifier", 0), ("classifier", 8), ("free", 0), ("free", 1), ("free", 3),
    ]  # fmt: skip
    plain = {key: rows[0][key] for key in ("fidelity", "diversity")}
    assert plain == {key: rows[2][key] for key in plain}      # at s = 0 both draw the same pictures
    assert rows[1]["diversity"] != rows[0]["diversity"]
    assert rows[3]["diversity"] != rows[4]["diversity"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["classifier", "guidance", "0"]
    assert f"{rows[4]['diversity']:.3f}" in lines[5]
    for name in ("guidance.png", "drawings.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_distance_is_within_a_class_and_of_different_drawings(module: ModuleType) -> None:
    """Flat images at 0, 1 and 3 have distances 1, 2 and 3; those of the other class are all alike."""
    flat = torch.tensor([0.0, 1.0, 3.0, 9.0, 9.0, 9.0]).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    assert module.distance(flat, 2) == pytest.approx((2.0 + 0.0) / 2, abs=1e-5)      # float32, by a matrix product


def test_fidelity_is_how_often_the_judge_sees_the_class_that_was_asked_for(module: ModuleType) -> None:
    class Judge(torch.nn.Linear):
        classes = 2

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert not t.any()
            return torch.stack([-x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    images = torch.tensor([-1.0, -1, 1, 1, 1, 1, 1, -1]).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    row = module.measured(Judge(1, 1), images, "free", 2.0)
    assert row.fidelity == 5 / 8
    assert row.error == pytest.approx((5 / 8 * 3 / 8 / 8) ** 0.5)


def test_the_table_says_what_the_best_scale_gains_and_loses(module: ModuleType) -> None:
    rows = [
        module.Row("classifier", 0, 0.125, 0.03, 0.8), module.Row("classifier", 2, 0.9, 0.02, 0.6),
        module.Row("classifier", 8, 0.9, 0.02, 0.5), module.Row("free", 0, 0.125, 0.03, 0.8),
        module.Row("free", 1, 0.7, 0.04, 0.7), module.Row("free", 4, 0.95, 0.02, 0.56),
    ]  # fmt: skip
    lines = module.table(rows)
    assert lines[2].split() == ["classifier", "guidance", "2", "90.0%", "±", "2.0%", "0.600"]
    assert lines[7] == (
        "classifier guidance at s = 2: the judge agrees +77.5 points more often than at s = 0, the distance is -25.0%"
    )
    assert lines[8] == (
        "classifier-free guidance at s = 4: the judge agrees +25.0 points more often than at s = 1, the distance is "
        "-20.0%"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [({"classifier_scales": (1,)}, "needs 0"), ({"free_scales": (0, 2)}, "0 and 1"), ({"count": 1}, "--count is")],
)
def test_flags_without_which_nothing_can_be_compared(module: ModuleType, folder: Path, more: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        module.main(config_of(module, folder, **more))


@pytest.mark.parametrize("spelling", ["guide.safetensors", "../{}/guide.safetensors"])
def test_nothing_judges_itself(module: ModuleType, folder: Path, spelling: str) -> None:
    judge = str(folder / spelling.format(folder.name))
    with pytest.raises(ModelError, match="cannot judge what it guides"):
        module.main(config_of(module, folder, judge=judge))


def test_networks_of_other_classes_or_sizes(module: ModuleType, folder: Path) -> None:
    others = {"dog, cow": tiny_classifier(0, ("dog", "cow", "owl")), "at 32": tiny_classifier(0, size=32)}
    for said, other in others.items():
        (folder / "judge.safetensors").unlink()
        write_classifier(other, folder / "judge.safetensors", None)
        with pytest.raises(ModelError, match=f"judge.* knows .*{said}"):
            module.main(config_of(module, folder))
    models.save(tiny_classes(classes=()), folder / "model.safetensors")
    with pytest.raises(ModelError, match="cannot guide itself"):
        module.main(config_of(module, folder))
