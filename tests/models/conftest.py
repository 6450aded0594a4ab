import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor


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
