"""Ours and the peer, each in a process of its own, step and step about; a table of the medians, and its JSON.

Both processes live at the same time, and one of them at a time is let do a step, ours, the peer's, ours again, so that
whatever slows the machine down for a while slows both. Reported are medians, and the largest resident size above what
was held when the weights were in place: preparing and warming up are part of that.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _process import PartFailed, Process, Side, Sides, Work

from models.replacing import replacing

GIB = 2**30
INTERRUPTED = 130   # as a shell reports a command that Ctrl-C ended


def command(doc: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """What every benchmark's command line does: measure, print the table row by row, and write it, then exit.

    doc: the text of --help. measure: yields rows of `compare`. With --json FILE the rows so far are written after each.
    Exits as `told`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the rows of the table there as well")
    file, rows = parser.parse_args().json, []
    print(HEADER, flush=True)
    with told():
        for row in measure():
            print(line(row), flush=True)
            rows.append(row)
            write(file, rows)


@contextmanager
def told() -> Iterator[None]:
    """What ends a measurement early is told in one sentence, and ends the program: a side that fails and a file that
    cannot be written with 1, Ctrl-C with 130, and SIGTERM, which is taken for one so that no side outlives it.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
        return
    except KeyboardInterrupt:
        sentence, code = "interrupted", INTERRUPTED
    except PartFailed as error:
        sentence, code = str(error), 1
    except OSError as error:
        sentence, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def write(file: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """The rows so far, in place of what was there, which stays if they cannot be written: OSError."""
    if file is not None:
        with replacing(file) as beside:
            beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def json_file(name: str) -> Path:
    """Where rows are to be written, as the `type` of an argument."""
    file = Path(name)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{file} cannot be written: there is no folder {file.parent}")
    if file.exists() and not file.is_file():
        raise argparse.ArgumentTypeError(f"{file} is a folder or a device: name a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{file} cannot be written: it, or its folder, is read-only")
    return file


def compare(works: Sequence[Work], ours: Side, peer: Side | None, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """A row for each of several pieces of work over the same networks, which are built for the first: medians of
    `rounds` steps of each side, after one to warm up. See `row`. peer: None where there is none to compare with.

    Memory is only told for one piece of work by itself: what a process has freed, it may still hold.
    """
    names = {"ours": ours, "peer": peer} if peer else {"ours": ours}
    with Sides([Process(name, side, works[0]) for name, side in names.items()]) as sides:
        for work in works:
            for side in sides:              # both are warm before the first is timed
                side.ask("start", work)
                side.ask("warm")
            seconds = [[side.ask("step") for side in sides] for _ in range(rounds)]
            peaks = [side.ask("peak") if len(works) == 1 else None for side in sides]
            missing = [None] * (2 - len(sides))
            yield row(work, *map(statistics.median, zip(*seconds)), *missing, *peaks, *missing)


def compare_cold(works: Sequence[Work], ours: Side, peer: Side, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """A row for each of our ways to do what is done once, like loading, all beside one run of the peer's: medians of
    `rounds`. Nothing is warm: every step has a new process. works: of them the peer does the first.
    """
    runs = [*(("ours", ours, work) for work in works), ("peer", peer, works[0])]
    measured = [[cold(*run) for run in runs] for _ in range(rounds)]
    *mine, theirs = ([median(values) for values in zip(*of_one)] for of_one in zip(*measured))     # seconds, bytes
    for work, (seconds, peak) in zip(works, mine):
        yield row(work, seconds, theirs[0], peak, theirs[1])


def cold(name: str, side: Side, work: Work) -> tuple[float, int | None]:
    """Seconds of a new process's first step, and its peak in bytes. name: for messages."""
    with Sides([Process(name, side, work)]) as (process,):
        process.ask("start", work)
        return process.ask("step"), process.ask("peak")


def median(values: Sequence[float | None]) -> float | None:
    """The median, if all were measured."""
    return None if None in values else statistics.median(values)


def row(
    work: Work, ours_s: float | None, peer_s: float | None, ours_bytes: int | None = None, peer_bytes: int | None = None
) -> dict[str, Any]:
    """A line of a table as JSON has it; what was not measured is None, and so is its ratio."""
    return asdict(work) | {
        "ours_s": ours_s, "peer_s": peer_s, "ratio": ratio(ours_s, peer_s), "ours_bytes_over_weights": ours_bytes,
        "peer_bytes_over_weights": peer_bytes, "ratio_bytes": ratio(ours_bytes, peer_bytes),
    }  # fmt: skip


def ratio(ours: float | None, peer: float | None) -> float | None:
    """ours / peer, if both were measured."""
    return None if ours is None or peer is None else ours / peer


HEADER = f"{'work':40} {'dtype':8} {'px':>4} {'mode':10} {'ours s':>8} {'peer s':>8} {'ratio':>6}" + (
    f" {'ours GiB':>9} {'peer GiB':>9} {'ratio':>6}"
)


def line(row: dict[str, Any]) -> str:
    """A row for people, under HEADER; memory in GiB over the weights."""
    def number(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    sizes = (row[f"{side}_bytes_over_weights"] for side in ("ours", "peer"))
    ours, peer = (None if size is None else size / GIB for size in sizes)
    return (
        f"{row['work']:40} {row['dtype']:8} {row['resolution']:4} {row['mode']:10} {number(row['ours_s'], 8, 3)} "
        f"{number(row['peer_s'], 8, 3)} {number(row['ratio'], 6, 2)} {number(ours, 9, 2)} {number(peer, 9, 2)} "
        f"{number(row['ratio_bytes'], 6, 2)}"
    )
