"""Fetching a model from the hub: its settings, and its weights in one format only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ModelError
from models.files import find_weights, read_json
from models.folder import STEMS


def download(repository: str, variant: str | None) -> Path:
    """The local folder of a repository, downloaded if need be: .safetensors, or .bin where there are none.

    Raises ModelError for a repository that does not exist, wants a licence accepted, or can be neither
    reached nor found in the cache.
    """
    from huggingface_hub import errors

    try:
        folder = _fetch(repository, variant, "safetensors")
        return folder if _is_complete(folder, variant) else _fetch(repository, variant, "bin")
    except errors.GatedRepoError as error:
        said = f"{repository} is behind a licence: accept it on its page and log in (`hf auth login`)"
        raise ModelError(said) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no repository {repository}, and there is no such folder here") from error
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelError(
            f"{repository} is neither a folder here nor in the download cache, and the hub cannot be "
            f"reached: connect to the network, or give a path"
        ) from error
    except (OSError, errors.HFValidationError) as error:
        raise ModelError(f"{repository} cannot be fetched from the hub: {error}") from error


def is_id(source: str) -> bool:
    """Whether a text has the form of a repository's id, owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source))


def cached(repository: str) -> Path | None:
    """The local folder of a repository, if its settings are in the download cache; nothing is fetched."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        files = [try_to_load_from_cache(repository, f"{part}/config.json") for part in STEMS]
    except errors.HFValidationError:            # no id that a repository could have
        return None
    return Path(files[0]).parents[1] if all(isinstance(file, str) for file in files) else None


@contextmanager
def fetched_whole(repository: str, folder: Path) -> Iterator[None]:
    """Say of what is wrong with a repository's folder that its download was interrupted, if it was.

    Without a network the hub's client gives what has come, and says nothing.
    """
    try:
        yield
    except ModelError as error:
        if not _broke_off(folder):
            raise
        said = f"the download of {repository} is not whole: connect to the network and load it again"
        raise ModelError(f"{error}; {said}") from error


def _fetch(repository: str, variant: str | None, suffix: str) -> Path:
    from huggingface_hub import snapshot_download

    dot = f".{variant}" if variant else ""
    shard = "-?????-of-?????"                   # as all are numbered; a star would match another variant's, too
    ends = (f"{dot}.{suffix}", f"{dot}{shard}.{suffix}", f"{shard}{dot}.{suffix}")
    weights = [f"{part}/{stem}{end}" for part, stems in STEMS.items() for stem in stems for end in ends]
    settings = ["model_index.json", "*/*.json", "*/merges.txt"]
    return Path(snapshot_download(repository, allow_patterns=[*settings, *dict.fromkeys(weights)]))


def _is_complete(folder: Path, variant: str | None) -> bool:
    try:
        for part, stems in STEMS.items():
            find_weights(folder / part, stems, variant)
    except ModelError:
        return False
    return True


def _broke_off(folder: Path) -> bool:
    """Whether settings or weights are missing of a network that the repository has."""
    index = folder / "model_index.json"
    named = read_json(index) if index.is_file() else STEMS

    def is_there(part: str) -> bool:
        weights = [file for suffix in ("safetensors", "bin") for file in (folder / part).glob(f"*.{suffix}")]
        return (folder / part / "config.json").is_file() and any(file.is_file() for file in weights)

    return not all(is_there(part) for part in STEMS if part in named)
