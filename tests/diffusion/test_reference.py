"""The reference case `diffusion_math` of openai/guided-diffusion and GLIDE, every tensor of it."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("diffusion_math", TESTS / "reference" / "diffusion_math.py")
diffusion_math = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(diffusion_math)

CONFIG = json.loads((TESTS / "fixtures" / "diffusion_math.json").read_text())
TENSORS = load_file(TESTS / "fixtures" / "diffusion_math.safetensors")
CASES = list(diffusion_math.check(CONFIG, TENSORS))


def test_nothing_is_left_out() -> None:
    assert {name for name in TENSORS if name.startswith("out.")} <= {name for name, _, _ in CASES}


@pytest.mark.parametrize(("name", "ours", "expected"), CASES, ids=[case[0] for case in CASES])
def test_reference(name: str, ours: object, expected: object) -> None:
    """The reference keeps its coefficients in float32: up to 8e-6 over a chain, hence the case's own
    bound."""
    assert ours.shape == expected.shape
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= CONFIG["bounds"]["output"]
