"""A side of a measurement in a process of its own, which answers how long a step took and what memory it needed.

The process builds its networks, notes what memory it holds, prepares, does a step to warm up, and then as many as it is
asked for, one at a time.

Memory is Linux's: VmRSS and VmHWM of /proc/self/status, the latter begun anew through /proc/self/clear_refs. Elsewhere
only times are measured.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

STATUS, CLEAR_REFS, RESTART_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"
SHORTEST = 0.2      # seconds: quicker steps are repeated until a measurement lasts as long
PATIENCE = 2        # seconds that a process may take to end by itself
Step = Callable[[], object]
Question = Literal["start", "warm", "step", "peak"] | Callable[[Step], Any]


@dataclass(frozen=True)
class Work:
    """What is measured. resolution: of the image, in pixels. low_memory: each side's thriftiest setting."""

    work: str
    dtype: Literal["float32", "bfloat16"]
    resolution: int
    mode: Literal["plain", "low_memory"] = "plain"


class Side(NamedTuple):
    """One way of doing it: functions that another process can import.

    build: makes the networks; what is held when it returns is not counted. start: prepares, and returns a step.
    """

    build: Callable[[Work], Any]
    start: Callable[[Any, Work], Step]


class PartFailed(RuntimeError):
    """A side of a measurement ended without an answer."""


def ended(code: int) -> str:
    """What to say of a process that ended with this code, and with no answer."""
    killed = " (killed: too little memory?)" if code == -signal.SIGKILL else ""
    return f"its process ended with code {code}{killed}"


class Process:
    """A side in a process of its own, which begins to build at once. name: for messages; work: the first."""

    def __init__(self, name: str, side: Side, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.name, self.work = name, work
        self.process = context.Process(target=live, args=(theirs, side, work, torch.get_num_threads()), daemon=True)
        self.process.start()
        theirs.close()                      # so that its end shows here as an end of file

    def ask(self, question: Question, work: Work | None = None) -> Any:
        """See `serve`. Raises PartFailed if the answer is a traceback, or the process ends without one."""
        self.work = work or self.work
        part = f"{self.name}, {' '.join(map(str, asdict(self.work).values()))}"
        try:
            self.pipe.send((question, work))
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise PartFailed(f"{part}: {ended(self.process.exitcode)}") from None
        if isinstance(answer, str):
            print(answer, file=sys.stderr)
            raise PartFailed(f"{part}: {answer.strip().splitlines()[-1]}")
        return answer

    def end(self) -> None:
        """End it: by itself, as it does when nobody asks any more, or after PATIENCE in the middle of a step."""
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.terminate()
        self.process.join()


class Sides(list[Process]):
    """Processes that end with the block, whatever they are doing then."""

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *_: object) -> None:
        for side in self:
            side.end()


def live(pipe: Connection, side: Side, work: Work, threads: int) -> None:
    """`serve`, in a process that leaves Ctrl-C to whoever asks, who ends it then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(pipe, side, work, threads)


def serve(pipe: Connection, side: Side, work: Work, threads: int) -> None:
    """The life of a side's process: build for the first piece of work, then answer questions.

    "start" prepares a piece of work and begins its peak of memory; "warm" does steps, to see how long they last;
    "step" answers with seconds, "peak" with bytes over what was held at "start"; a function is called with the step
    and its result is the answer. A failure answers with a traceback.
    """
    try:
        torch.set_num_threads(threads)
        built, step, repeat, held = side.build(work), None, 1, None
        while True:
            match pipe.recv():
                case "start", work:
                    step = None             # what came before is gone when the peak begins
                    held, repeat = begin_peak(), 1
                    step = side.start(built, work)
                    answer = None
                case "warm", _:
                    answer = repeat = repetitions(step)
                case "step", _:
                    answer = timed(step, repeat)
                case "peak", _:
                    answer = peak_over(held)
                case function, _:
                    answer = function(step)
            pipe.send(answer)
    except (EOFError, BrokenPipeError):
        return                              # whoever asked is gone
    except BaseException:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(traceback.format_exc())


def repetitions(step: Step) -> int:
    """Warm up. Returns how many steps a measurement needs to last long enough to be trusted."""
    seconds = timed(step, 1)
    if seconds < 5 * SHORTEST:              # the first may have been slow because it was the first
        seconds = timed(step, 1)
    return 1 if seconds > SHORTEST else int(SHORTEST / seconds) + 1


def timed(step: Step, repeat: int) -> float:
    """Seconds of a step, the mean of some in a row."""
    started = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - started) / repeat


def begin_peak() -> int | None:
    """Begin the peak of memory anew. Returns the bytes that are resident now; None where the system does not tell."""
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):    # glibc's: what building freed goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text(RESTART_PEAK)
    except OSError:
        return None
    return resident("VmRSS")


def peak_over(held: int | None) -> int | None:
    """The most that was resident since `begin_peak`, in bytes above what was held then."""
    return None if held is None else resident("VmHWM") - held


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """A size in this process's status, in bytes."""
    fields = dict(entry.split(":", 1) for entry in STATUS.read_text().splitlines())
    return 1024 * int(fields[field].split()[0])
