"""The same draws on every run: torch is seeded before each test, hypothesis takes its examples in a
fixed order."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("diffusion", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("diffusion")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
