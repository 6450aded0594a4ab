"""Which device a network goes to, as far as a machine without one can tell."""

import pytest
import torch

from models import ModelError
from models.devices import choose_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compute capabilities 8.6 and 6.1, the second the current one, and a torch that was built for 7.5 and later."""
    gpus = {0: ((8, 6), "a new one"), 1: ((6, 1), "an old one")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_100", "compute_100"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][1])


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_known_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be another one once torch's current one is."""
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda", must_be_there=False) == torch.device("cuda")
    with pytest.raises(ModelError, match="there is no device cuda:2: torch sees 2 GPUs, from cuda:0 on"):
        choose_device("cuda:2")
    for asked in (None, "cuda", "cuda:1"):
        with pytest.raises(ModelError, match="no kernels for cuda:1, an old one, which is of compute capability 6.1"):
            choose_device(asked)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a"])                # ROCm's, which says nothing
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("built", "instead"), [("13.0", "a newer driver of the GPU"), (None, "a CUDA build of torch")])
def test_without_a_gpu_it_says_what_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, built: str | None, instead: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(ModelError, match=f"this torch sees no GPU: use cpu, or {instead}$"):
        choose_device("cuda")
