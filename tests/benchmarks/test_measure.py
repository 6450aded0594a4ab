"""The harness: who is asked when, medians and JSON, failures, and memory that is known."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _measure
import pytest
import torch
from _process import PartFailed, Process, Side, Sides, Step, Work, serve

from tests.disk import full_disk

WORK, MIB = Work("some_work", "float32", 64), 2**20
FIELDS = [
    "work", "dtype", "resolution", "mode", "ours_s", "peer_s", "ratio", "ours_bytes_over_weights",
    "peer_bytes_over_weights", "ratio_bytes",
]  # fmt: skip


class Scripted:
    """A process whose answers are known; `asked` collects what all of them were asked."""

    asked: list[tuple[str, str]] = []
    answers: dict[str, dict[str, list[Any]]] = {}

    def __init__(self, name: str, side: Side, work: Work) -> None:
        self.name = name

    def ask(self, question: str, work: Work | None = None) -> Any:
        self.asked.append((self.name, question))
        return self.answers[self.name][question].pop(0) if question in self.answers[self.name] else None

    def end(self) -> None:
        self.asked.append((self.name, "end"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(_measure, "Process", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    answers = {"ours": {"step": [3.0, 1.0, 2.0], "peak": [50]}, "peer": {"step": [4.0, 40.0, 5.0], "peak": [200]}}
    monkeypatch.setattr(Scripted, "answers", answers)
    return Scripted


def test_steps_alternate_once_both_are_warm_and_medians_are_compared(scripted: type[Scripted]) -> None:
    (row,) = _measure.compare([WORK], Side(None, None), Side(None, None))
    both = ["ours", "peer"]
    expected = [(name, each) for name in both for each in ("start", "warm")] + [(name, "step") for name in both * 3]
    assert scripted.asked == [*expected, *((name, each) for each in ("peak", "end") for name in both)]
    assert list(row) == FIELDS
    assert (row["ours_s"], row["peer_s"]) == (2.0, 5.0)
    assert row["ratio"] == 2.0 / 5.0
    assert (row["ours_bytes_over_weights"], row["peer_bytes_over_weights"], row["ratio_bytes"]) == (50, 200, 0.25)
    assert (row["work"], row["dtype"], row["resolution"], row["mode"]) == ("some_work", "float32", 64, "plain")


def test_what_is_not_measured_is_none(scripted: type[Scripted]) -> None:
    (alone,) = _measure.compare([WORK], Side(None, None), None)
    assert (alone["ours_s"], alone["ours_bytes_over_weights"]) == (2.0, 50)
    assert [alone[field] for field in FIELDS if field.startswith(("peer", "ratio"))] == [None] * 4
    scripted.answers = {name: {"step": [1.0] * 6, "peak": [7, 7]} for name in ("ours", "peer")}
    rows = list(_measure.compare([WORK, WORK], Side(None, None), Side(None, None)))
    assert [row["ratio_bytes"] for row in rows] == [None, None]    # the second would have the first's memory to use
    assert all("-" in _measure.line(row) for row in (alone, *rows))


def test_cold_steps_have_new_processes(scripted: type[Scripted]) -> None:
    """Two ways of ours, in turn with one of the peer's, which both are compared with."""
    scripted.answers["ours"] = {"step": [1.0, 2.0, 3.0, 6.0, 2.0, 4.0], "peak": [1, 8, 2, 8, 9, 8]}
    scripted.answers["peer"] = {"step": [8.0] * 3, "peak": [4] * 3}
    thrifty = replace(WORK, mode="low_memory")
    rows = list(_measure.compare_cold([WORK, thrifty], Side(None, None), Side(None, None)))
    life = [(name, each) for name in ("ours", "ours", "peer") for each in ("start", "step", "peak", "end")]
    assert scripted.asked == life * 3
    keys = ("mode", "ours_s", "ratio", "ours_bytes_over_weights", "ratio_bytes")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found == [("plain", 2.0, 0.25, 2, 0.5), ("low_memory", 4.0, 0.5, 8, 2.0)]


def test_cold_memory_that_the_system_does_not_tell(scripted: type[Scripted]) -> None:
    scripted.answers = {name: {"step": [1.0], "peak": [None]} for name in ("ours", "peer")}
    (row,) = _measure.compare_cold([WORK], Side(None, None), Side(None, None), rounds=1)
    assert (row["ratio"], row["ours_bytes_over_weights"], row["ratio_bytes"]) == (1.0, None, None)


def run_command(monkeypatch: pytest.MonkeyPatch, measure: Callable[[], Iterator[dict]], *arguments: str) -> Any:
    """The exit code or sentence of a command line; None if it came to its end."""
    monkeypatch.setattr(sys, "argv", ["some_work.py", *arguments])
    try:
        _measure.command("doc", measure)
    except SystemExit as end:
        return end.code
    return None


def test_json_has_the_rows_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = _measure.row(WORK, 1.0, 4.0, 3 * 2**30, None)

    def measure() -> Iterator[dict]:
        yield row
        raise PartFailed("the peer broke")

    assert run_command(monkeypatch, measure, "--json", str(tmp_path / "rows.json")) == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    said = capsys.readouterr()
    assert "some_work" in said.out
    assert said.err == "some_work.py: the peer broke\n"
    assert run_command(monkeypatch, lambda: iter([row])) is None
    monkeypatch.setattr("os.access", lambda path, how: path != tmp_path)        # for root all can be written
    for cannot_be_written in (tmp_path / "no" / "x.json", tmp_path, tmp_path / "x.json"):
        assert run_command(monkeypatch, lambda: pytest.fail("measured"), "--json", str(cannot_be_written)) == 2


def build_and_stay_busy(work: Work) -> None:
    time.sleep(60)


def test_a_process_ends_by_itself_and_a_busy_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first so that what it holds is cleaned up: a lock that it leaves behind is complained of."""
    monkeypatch.setattr("_process.PATIENCE", 60)
    with Sides([Process("ours", Side(build, start_small), WORK)]) as (waiting,):
        waiting.ask("start", WORK)
    monkeypatch.setattr("_process.PATIENCE", 0.1)
    with Sides([Process("ours", Side(build_and_stay_busy, start_small), WORK)]) as (busy,):
        pass
    assert [each.process.exitcode for each in (waiting, busy)] == [0, -signal.SIGTERM]


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_is_a_sentence_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, signalled: signal.Signals
) -> None:
    sides: list[Process] = []

    def measure() -> Iterator[dict]:
        with Sides([Process("ours", Side(build, start_small), WORK)]) as sides[:]:
            signal.raise_signal(signalled)
            yield _measure.row(WORK, 1.0, None)

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}     # as a command begins
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    try:
        assert run_command(monkeypatch, measure) == 130
        assert {each: signal.getsignal(each) for each in usual} == usual
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "some_work.py: interrupted\n"
    assert [side.process.is_alive() for side in sides] == [False]


def test_a_full_disk_is_a_sentence_and_leaves_the_rows_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, row = tmp_path / "rows.json", _measure.row(WORK, 1.0, 4.0)
    with full_disk(400):                                                        # which one row fits into, and not two
        assert run_command(monkeypatch, lambda: iter([row, row]), "--json", str(file)) == 1
    assert json.loads(file.read_text()) == [row]
    assert capsys.readouterr().err.startswith(f"some_work.py: {file}: ")
    assert list(tmp_path.iterdir()) == [file]


def build(work: Work) -> torch.Tensor:
    torch.ones(300 * MIB // 4)                  # building takes more for a moment, which does not count
    return torch.ones(100 * MIB // 4)           # nor do these, the weights


def start_with(mebibytes: int) -> Callable[[torch.Tensor, Work], Step]:
    def start(built: torch.Tensor, work: Work) -> Step:
        torch.ones(mebibytes * MIB // 4)        # freed at once, but it was needed
        return lambda: None

    return start


def start_small(built: torch.Tensor, work: Work) -> Step:
    return start_with(50)(built, work)


def start_large(built: torch.Tensor, work: Work) -> Step:
    return start_with(100)(built, work)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's")
def test_memory_over_the_weights_is_the_peaks() -> None:
    (row,) = _measure.compare([WORK], Side(build, start_small), Side(build, start_large))
    # Linux counts resident pages a processor at a time, to some hundred KiB; the rest are pages of libraries
    assert 49 * MIB <= row["ours_bytes_over_weights"] < 60 * MIB
    assert 99 * MIB <= row["peer_bytes_over_weights"] < 110 * MIB


def leave(built: torch.Tensor, work: Work) -> Step:
    os._exit(3)


def test_a_process_that_ends_is_named() -> None:
    with pytest.raises(PartFailed, match="ours, some_work float32 64 plain: its process ended with code 3"):
        list(_measure.compare([WORK], Side(build, leave), None))


def result(step: Step) -> object:
    return step()


def test_questions_are_answered_and_a_failure_with_a_traceback() -> None:
    def start(built: str, work: Work) -> Step:
        if work.mode == "low_memory":
            raise ValueError(f"{built} cannot save memory")
        return lambda: done.append(work) or len(done)

    done: list[Work] = []
    ours, theirs = multiprocessing.Pipe()
    threads = torch.get_num_threads()
    serving = threading.Thread(target=serve, args=(theirs, Side(lambda work: "a network", start), WORK, threads))
    serving.start()
    answers = []
    for question in (("start", WORK), ("step", None), (result, None), ("start", replace(WORK, mode="low_memory"))):
        ours.send(question)
        answers.append(ours.recv())
    serving.join()
    assert done == [WORK, WORK]
    assert answers[0] is None
    assert answers[1] > 0                       # seconds
    assert answers[2] == 2
    assert answers[3].startswith("Traceback")
    assert answers[3].endswith("ValueError: a network cannot save memory\n")
