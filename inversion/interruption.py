"""Ctrl-C, or a system's wish that the process ends, while something is written: it waits until that is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAITING = signal.SIGINT, signal.SIGTERM


@contextmanager
def unbroken() -> Iterator[None]:
    """Within the block neither signal does anything; if one came, it is passed on when the block has ended, unless that
    ends by an error, which leaves in its place.

    Only the main thread is ever interrupted, so in another nothing changes.
    """
    before = {each: signal.getsignal(each) for each in WAITING}
    if threading.current_thread() is not threading.main_thread() or None in before.values():    # not Python's to know
        yield
        return
    came: list[int] = []
    for each in WAITING:
        signal.signal(each, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        signal.raise_signal(came[0])
