"""What every script does around its `main`: read the command line, and turn a refusal into one sentence."""

import dataclasses
import inspect
import io
import signal
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFUSED = 2
INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended


def run(main: Callable[[Any], None]) -> None:
    """Calls `main` with what the command line says, and exits.

    main: takes one dataclass, whose fields become the flags. The module's docstring and the dataclass's are the text of
    --help. Exit codes: 0; 2 after one sentence on stderr, for what the
    four packages refuse and for files that cannot be read or written; 130 after Ctrl-C, and after SIGTERM, which is
    taken for one: a training saves what it has learned. A warning is one sentence, too. A prompt in letters that a
    terminal or a log cannot hold is written in escapes, and ends nothing.
    """
    import tyro

    from diffusion.errors import DiffusionError
    from guidance.errors import GuidanceError
    from inversion.errors import InversionError
    from inversion.exhaustion import is_out_of_memory
    from models.errors import ModelError

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    _refuse_repeats(sys.argv[1:])
    config, description = _config(main)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(_at_home(tyro.cli(config, description=description)))
    except (DiffusionError, GuidanceError, InversionError, ModelError) as error:
        _stop(str(error), REFUSED)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # a second one finds nothing left to interrupt
        _stop("interrupted", INTERRUPTED)
    except Exception as error:
        if is_out_of_memory(error):
            _stop(
                "out of memory: what was written so far is kept; take fewer or smaller images at once, a --dtype of "
                "16 bits, or --offload stream",
                REFUSED,
            )
        if not isinstance(error, OSError):
            raise
        what = error.strerror or str(error)
        _stop(f"{error.filename}: {what}" if error.filename else what, REFUSED)


def _config(main: Callable[[Any], None]) -> tuple[type, str]:
    """The dataclass that `main` takes, and the text of --help."""
    (config,) = [hint for name, hint in typing.get_type_hints(main).items() if name != "return"]
    texts = [inspect.getmodule(main).__doc__, config.__doc__]
    if config.__doc__.startswith(f"{config.__name__}("):
        texts.pop()  # what dataclasses write where there is no docstring
    return config, "\n\n".join(inspect.cleandoc(text) for text in texts if text)


def _at_home(config: Any) -> Any:
    """The flags, with paths that begin with ~ in the user's home."""
    from models.files import as_path

    paths = {name: as_path(value) for name, value in vars(config).items() if isinstance(value, Path)}
    return dataclasses.replace(config, **paths)


def named() -> set[str]:
    """The fields of a script's dataclass whose flags stand on the command line, whatever their values."""
    return {flag.replace("-", "_") for flag in _flags(sys.argv[1:])}


def _flags(arguments: list[str]) -> list[str]:
    """Without their dashes; of a switch, which --no-name turns off, the name alone."""
    return [a.split("=")[0][2:].replace("_", "-").removeprefix("no-") for a in arguments if a.startswith("--")]


def _refuse_repeats(arguments: list[str]) -> None:
    """The command line would keep the last of two values and drop the first without a word."""
    flags = _flags(arguments)
    twice = next((flag for flag in flags if flags.count(flag) > 1), None)
    if twice:
        _stop(f"--{twice} is there twice: write all of its values after one --{twice}", REFUSED)


def _stop(sentence: str, code: int) -> typing.NoReturn:
    print(" ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)
