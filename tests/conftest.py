"""Tests side by side, `pytest -n 2`."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Threads of torch that wait give their core to the other processes, which inherit this before they import it."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
