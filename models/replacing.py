"""Writing a file beside its place and renaming it into it: there is never half a file."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` when the block ends; if it fails, nothing is left of it.

    The folder is made if need be. An OSError that names no file, as a full disk's, is raised with this one's name.
    Raises IsADirectoryError where a folder lies.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = own_name(path, "part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def own_name(path: Path, what: str) -> Path:
    """A name beside `path` that no one else has: `path.old` may well be somebody's backup, or another process's."""
    return path.with_name(f".{path.name}.{what}-{os.getpid()}-{time.time_ns()}")


def write_pickle(path: Path, content: Any) -> None:
    """What torch.save writes of tensors and numbers, beside `path`, and rename.

    Raises OSError, for a full disk too: that torch hides behind a RuntimeError of its own when it then closes the file.
    """
    with replacing(path) as beside, open(beside, "wb") as file:     # by its name, torch would lose the system's error
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
