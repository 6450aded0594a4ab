import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(HERE / "check_reference.py"))


def copy(case: str, folder: Path, name: str | None = None) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(FIXTURES / f"{case}{suffix}", folder / f"{name or case}{suffix}")
    return folder / f"{name or case}.json"


def test_every_case_of_the_fixtures_agrees(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script["main"](str(FIXTURES)) == 0
    out = capsys.readouterr().out
    for case in (file.stem for file in FIXTURES.glob("*.safetensors")):
        for name in load_file(FIXTURES / f"{case}.safetensors"):
            assert not name.startswith("out.") or f"{case} {name} " in out
    assert out.count("tokenizer_clip ") == len(
        json.loads((FIXTURES / "tokenizer_clip.json").read_text())["cases"]
    )


def test_a_number_that_is_off_fails(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = copy("openclip_text_tiny", tmp_path).with_suffix(".safetensors")
    tensors = load_file(weights)
    tensors["out.last"][0, 0, 0] += 1e-3
    save_file(tensors, weights)
    assert script["main"](str(tmp_path)) == 1
    assert "openclip_text_tiny out.last: error" in capsys.readouterr().err


def test_an_output_that_nothing_computes_fails(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = copy("openclip_text_tiny", tmp_path).with_suffix(".safetensors")
    save_file(load_file(weights) | {"out.pooled": torch.ones(1)}, weights)
    assert script["main"](str(tmp_path)) == 1
    assert "out.pooled: nothing computes it" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["use_spatial_transformer", "legacy", "attn_resolutions"])
def test_a_network_that_there_is_not_fails(script: dict[str, Any], tmp_path: Path, key: str) -> None:
    file = copy("compvis_ldm_tiny", tmp_path)
    config = json.loads(file.read_text())
    part = "vae" if key in config["vae"] else "unet"
    config[part][key] = [8] if key == "attn_resolutions" else not config[part][key]
    file.write_text(json.dumps(config))
    assert script["main"](str(tmp_path)) == 1


def test_a_case_of_a_known_family_by_another_name_runs(script: dict[str, Any], tmp_path: Path) -> None:
    copy("openclip_text_tiny", tmp_path, "openclip_text_other")
    assert script["main"](str(tmp_path)) == 0


def test_an_unknown_family_fails(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy("openclip_text_tiny", tmp_path, "imagen_tiny")
    assert script["main"](str(tmp_path)) == 1
    assert "imagen_tiny: no family of that name" in capsys.readouterr().err


def test_an_empty_folder_fails(script: dict[str, Any], tmp_path: Path) -> None:
    assert script["main"](str(tmp_path)) == 1


def test_error_measures() -> None:
    script = runpy.run_path(str(HERE / "check_reference.py"))
    error = script["error"]
    assert error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25
    assert error(torch.tensor([1.0]), torch.tensor([1.0, 1.0])) == float("inf")
    assert error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert script["bound"]("out.x_grad", {"output": 1.0, "gradient": 2.0}) == 2.0
    assert script["bound"]("'a dog'", {}) == 0.0
