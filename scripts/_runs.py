"""The output folder of a run: a new one, or an interrupted run's, which goes on with its own flags."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from inversion import InversionError
from inversion.formats import require_writable
from models.replacing import replacing

FLAGS = "run.json"


def new_folder(output: Path | None, name: str, resume: str = "") -> Path:
    """Where a run goes, not made yet: `output`, or outputs/<time>-<name>.

    resume: the flag that continues an interrupted run, if the command has one.

    Raises InversionError if anything is there, or nothing can be written there.
    """
    folder = output or Path("outputs") / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{name}"     # two may start in one second
    require_writable(folder, "--output")
    if folder.exists() and any(folder.iterdir()):
        go_on = f", or, if it is an interrupted run, continue it with {resume}" if resume else ""
        raise InversionError(f"{folder} already holds something: choose another --output{go_on}")
    return folder


def require_places(**files: Path | None) -> None:
    """Raise InversionError unless the files can be written, of which what takes hours is to end in them.

    files: by the names of their flags; None is one that nobody asked for.
    """
    for flag, file in files.items():
        if file is not None and file.is_dir():
            raise InversionError(f"--{flag} {file} is a folder: name a file, such as {file / flag}")
        if file is not None:
            require_writable(file.absolute().parent, f"--{flag}")


def save_flags(folder: Path, config: Any) -> None:
    """Note the flags of a run, a dataclass, in its folder."""
    write_json(folder / FLAGS, {key: _from_anywhere(value) for key, value in dataclasses.asdict(config).items()})


def resumed(folder: Path, config: Any, may_differ: Sequence[str] = (), named: Collection[str] = ()) -> Any:
    """The flags that the run in a folder was started with, as config's dataclass.

    config: the flags given now: those that differ from their defaults, and those of `named`, which stand on the command
    line. may_differ: those of them that take the place of the run's. Raises InversionError if the folder holds no run,
    or another flag was given that is not as it was.
    """
    try:
        saved = json.loads((folder / FLAGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InversionError(f"{folder} is not the folder of a run: it has no readable {FLAGS}") from error
    if not isinstance(saved, dict):
        raise InversionError(f"{folder / FLAGS} holds no flags of a run")
    hints = typing.get_type_hints(type(config))
    if missing := [key for key in hints if key not in saved and key != "resume"]:
        raise InversionError(f"{folder / FLAGS} is damaged, or of another version: it lacks {', '.join(missing)}")
    saved = {key: _as(hints[key], value) for key, value in saved.items() if key in hints}
    for key, value in saved.items():
        if not _fits(hints[key], value):
            raise InversionError(f"{folder / FLAGS} is damaged: {key} cannot be {value!r}")
    if config.output == folder:
        saved["output"] = folder.absolute()     # it may have been moved
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        if field.name == "resume" or given == field.default and field.name not in named:
            continue
        if field.name in may_differ:
            saved[field.name] = given
            continue
        if _from_anywhere(given) != saved.get(field.name):
            raise InversionError(
                f"the run in {folder} has {field.name} {saved.get(field.name)}, not {given}: leave it out"
            )
    return type(config)(**saved)


def word_and_file(text: str) -> tuple[str | None, Path]:
    """What names a learned word on the command line: FILE, or WORD=FILE to choose among several or to rename one."""
    word, equals, file = text.partition("=")
    return (word, Path(file)) if equals and not os.path.exists(text) else (None, Path(text))


def write_json(file: Path, content: Any) -> None:
    """Write beside the file, and rename; the folder is made if need be."""
    with replacing(file) as beside:
        beside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _from_anywhere(value: Any) -> Any:
    """A flag that means the same in every working folder: a path, or text that names one that is there, is absolute.

    A text without a slash is a word, or a model's name, unless it has a file's ending.
    """
    if isinstance(value, str):
        word, file = word_and_file(value)
        if os.sep in str(file) and os.path.exists(file) or file.suffix and os.path.isfile(file):   # may be a long text
            return str(file.absolute()) if word is None else f"{word}={file.absolute()}"
    return value.absolute() if isinstance(value, Path) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a flag of that type can have a value."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(option, value) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(options[0], item) for item in value)
    return isinstance(value, Path) if hint is Path else type(value) in {float: (int, float)}.get(hint, (hint,))


def _as(hint: Any, value: Any) -> Any:
    """A value read from JSON as the type of its flag: paths were written as text, tuples as lists."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in options else value
