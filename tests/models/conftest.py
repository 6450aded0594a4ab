import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import models

if TYPE_CHECKING:
    from tests.models.pipeline import Pipeline


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Pipeline":
    from tests.models.pipeline import Pipeline  # which imports diffusers and transformers

    return Pipeline(request.param, tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def ours(peer: "Pipeline") -> models.LatentModel:
    return models.load(peer.folder, dtype=torch.float64, device="cpu")


@pytest.fixture
def copy(peer: "Pipeline", tmp_path: Path) -> Path:
    """A copy of the peer's folder, to be changed."""
    return Path(shutil.copytree(peer.folder, tmp_path / "copy"))


@pytest.fixture
def lies_in() -> Callable[[Tensor, Path], bool]:
    """Whether a tensor's numbers are the memory map of a file (as Linux tells it)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")

    def lies_in(tensor: Tensor, path: Path) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, *_, name = line.split(maxsplit=5)
            first, last = (int(address, 16) for address in span.split("-"))
            if first <= tensor.data_ptr() < last:
                return name == str(path)
        return False

    return lies_in
