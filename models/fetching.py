"""Fetching published files once, into the user's cache: beside their place and renamed, resumed where it broke."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from models.errors import ModelError

CHUNK = 2**20
TIMEOUT = 30  # seconds without a byte


def cache(folder: str) -> Path:
    """A folder of fetched files: oneword/<folder> in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oneword" / folder


def fetch_all(places: Mapping[str, Path]) -> list[Path]:
    """The files of several addresses. Raises ModelError as `fetch`, with the addresses of all that are missing."""
    try:
        return [fetch(url, path) for url, path in places.items()]
    except ModelError as error:
        missing = [url for url, path in places.items() if not path.is_file()]
        raise ModelError(f"{error} (needed in all: {', '.join(missing)})") from error


def fetch(url: str, path: Path) -> Path:
    """The file at `path`, downloaded if it is not there yet; with a progress bar.

    Raises ModelError, with the address, if that fails; what has come is kept, and the next call goes on from there.
    """
    if path.is_file():
        return path
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, beside)
        os.replace(beside, path)
    except (OSError, HTTPException) as error:  # urllib's errors among them
        if path.is_file():                     # another process fetched it, too, and was the first
            return path
        raise ModelError(
            f"{path.name} is not in the cache and {url} cannot be fetched ({getattr(error, 'reason', error)}): connect "
            f"to the network and try again, or put the file at {path}"
        ) from error
    return path


@contextmanager
def to_be_removed(path: Path) -> Iterator[None]:
    """Say of what is wrong with a fetched file how to get another."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error}; remove {path} to have it fetched anew") from error


def _download(url: str, beside: Path) -> None:
    """Write what is missing of a file. Raises OSError if the connection ends before the file does.

    Each byte is written in its own place, not at the end, so that two processes may do this at the same time.
    """
    from tqdm import tqdm

    have = beside.stat().st_size if beside.exists() else 0
    with _answer(url, have) as answer:
        have = have if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
        length = answer.headers["Content-Length"]
        total = None if length is None else have + int(length)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=beside.stem)
        if not have:
            beside.touch()
        with open(beside, "r+b") as file, bar:
            file.seek(have)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise OSError(f"the connection ended after {file.tell()} of {total} bytes")
            file.truncate()


def _answer(url: str, have: int) -> HTTPResponse:
    """What comes after the first bytes of a file, or, if it has no more than these, all of it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _answer(url, 0)
        raise
