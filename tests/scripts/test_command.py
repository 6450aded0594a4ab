"""`scripts/_command.py`: every refusal is one sentence on stderr and exit code 2, and Ctrl-C is 130."""

import errno
import importlib.util
import io
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffusion import DiffusionError
from guidance import GuidanceError
from inversion import InversionError
from models import ModelError

_spec = importlib.util.spec_from_file_location(
    "_command", Path(__file__).parents[2] / "scripts" / "_command.py"
)
_command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_command)


@dataclass
class Config:
    """Numbers to take."""

    count: int = 1
    words: tuple[str, ...] = ()
    mirrored: bool = False
    output: Path | None = None


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """What `main` got."""
    got: list[Config] = []

    def main(config: Config) -> None:
        got.append(config)

    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    _command.run(main)
    return got[0]


def refused(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def main(config: Config) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stopped:
        _command.run(main)
    return stopped.value.code


def test_fields_are_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, "--count", "3", "--words", "a b", "c") == Config(3, ("a b", "c"))
    assert started(monkeypatch) == Config()


def test_a_system_that_ends_the_process_is_taken_for_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a training saves; and what is pressed again while it leaves breaks nothing."""
    saved: list[str] = []

    def main(config: Config) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            saved.append("what it has")
            raise

    def leaves(code: int) -> None:
        signal.raise_signal(signal.SIGINT)
        raise SystemExit(code)

    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "exit", leaves)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            _command.run(main)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert (stopped.value.code, saved) == (130, ["what it has"])


def test_a_help_that_nobody_reads_to_its_end_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")        # as `| head` leaves it

    def main(config: Config) -> None:
        pytest.fail("it began")

    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as stopped:
        _command.run(main)
    assert (stopped.value.code, capsys.readouterr().err) == (2, "Broken pipe\n")


def test_no_memory_is_a_sentence_and_a_fault_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing_mapped = OSError(errno.ENOMEM, "Cannot allocate memory", "a library")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), nothing_mapped):
        assert refused(monkeypatch, error) == 2
        assert capsys.readouterr().err.startswith("out of memory: what was written so far is kept; take fewer")
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        refused(monkeypatch, RuntimeError("shapes do not match"))


@pytest.mark.parametrize("kind", [DiffusionError, GuidanceError, InversionError, ModelError])
def test_refusals(kind: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(monkeypatch, kind("one\n  sentence")) == 2
    assert capsys.readouterr().err == "one sentence\n"


def test_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(monkeypatch, FileNotFoundError(2, "No such file or directory", "here.png")) == 2
    assert capsys.readouterr().err == "here.png: No such file or directory\n"
    assert refused(monkeypatch, OSError("no network and no cache")) == 2
    assert capsys.readouterr().err == "no network and no cache\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, KeyboardInterrupt()) == 130


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: Config) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(TypeError, match="a bug"):
        _command.run(main)


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell puts it into --output=~/x, and a folder called ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert started(monkeypatch, "--output=~/x") == Config(output=tmp_path / "x")


@pytest.mark.parametrize(
    "arguments", [("--words", "a", "--words", "b"), ("--count=1", "--count", "2"), ("--mirrored", "--no-mirrored")]
)
def test_a_flag_given_twice(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse would keep the last and drop the first without a word."""
    with pytest.raises(SystemExit) as stopped:
        started(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert "is there twice: write all of its values after one --" in capsys.readouterr().err


def test_help_is_the_docstrings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        started(monkeypatch, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "every refusal is one sentence" in shown  # this module's docstring
    assert "Numbers to take." in shown
    assert "--words" in shown


def test_a_warning_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)       # put back when this ends
    started(monkeypatch)
    assert warnings.formatwarning("two words", UserWarning, "file.py", 3) == "warning: two words\n"


def test_letters_that_a_log_cannot_hold_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "argv", ["script"])

    def main(config: Config) -> None:
        print("wrote <süß>")

    _command.run(main)
    log.flush()
    assert log.buffer.getvalue().rstrip() == rb"wrote <s\xfc\xdf>"
