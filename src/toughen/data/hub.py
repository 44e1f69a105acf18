"""``hf:OWNER/NAME``: the parquet files of a public data set card, downloaded once by huggingface_hub into its cache.

Parquet files are all that is ever downloaded. Where a card has none, and a script in their place, the hub's own
conversion is read.
"""

import glob
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath

from toughen.data.encoded import EncodedRows
from toughen.data.parquet import TEST_PARTS, choose_parts, read_tables
from toughen.data.settings import DATASETS, DataSettings, Source
from toughen.downloads import check_hub_files
from toughen.errors import InputError

_REVISIONS = ("main", "refs/convert/parquet")  # the card's own files first, then the conversion
_TIMEOUT = 10.0  # seconds until the cache is used instead

Files = tuple[list[Path], list[Path]]


def read_hub(settings: DataSettings) -> tuple[EncodedRows, EncodedRows]:
    """Read the data set ``OWNER/NAME``, or its folder ``OWNER/NAME@CONFIG``, with the columns of ``parquet:PATH``.

    Raises:
        InputError: As for ``fetch`` and ``read_parquet``.
    """
    assert settings.path is not None  # the settings saw to it
    repository, _, config = settings.path.partition("@")
    return read_tables(*fetch(repository, config=config or None, local="parquet:FOLDER"))


def fetch(repository: str, *, local: str, config: str | None = None, tests: Sequence[str] = TEST_PARTS) -> Files:
    """Download the training files and the test files of a card, or find them in huggingface_hub's cache.

    Args:
        repository: ``OWNER/NAME``.
        local: How a local copy of the data set is named, for errors.
        config: The folder with the files; see ``choose_parts``.
        tests: What the test part may be called; the first that is there is taken.

    Raises:
        InputError: There is no such data set, none with these files, or no access to it; or the hub cannot be reached
            and the cache does not hold it.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository) or re.search(r"--|\.\.|[.-](/|$)", repository):
        raise InputError(f"{repository!r} is not the name of a data set on the hub; write hf:OWNER/NAME")
    with _quiet():
        try:
            found = _download(repository, config, tests)
        except InputError:
            raise
        except Exception as error:  # the hub's, the HTTP client's or the disk's: a copy from before serves as well
            found = _cached(repository, config, tests)
            if found is None:
                raise _explained(error, repository, local) from error
    if found is None:
        raise InputError(
            f"{repository} on the hub has no files {config or '[CONFIG]'}/train-*.parquet, and the hub none converted;"
            f" download it yourself and use {local}"
        )
    return found


def _download(repository: str, config: str | None, tests: Sequence[str]) -> Files | None:
    from huggingface_hub import HfApi, snapshot_download  # slow to import, and only some data sets need it
    from huggingface_hub.errors import RevisionNotFoundError

    for revision in _REVISIONS:
        try:
            card = HfApi().dataset_info(repository, revision=revision, timeout=_TIMEOUT)
        except RevisionNotFoundError:
            continue
        names = [file.rfilename for file in card.siblings or ()]
        parts = choose_parts(names, where=repository, config=config, tests=tests)
        if parts is not None:
            wanted = [glob.escape(name) for part in parts for name in part]
            began = time.time()
            folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted)
            files = _in_folder(folder, parts)
            # not what was checked when it came: that can be 150 GB
            check_hub_files(file for file in chain(*files) if file.stat().st_mtime >= began - 2)
            return files
    return None


def _cached(repository: str, config: str | None, tests: Sequence[str]) -> Files | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for revision in _REVISIONS:
        try:
            folder = _snapshot(repository, revision, [])
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
            parts = choose_parts(names, where=str(folder), config=config, tests=tests)
            if parts is not None and all(map(_is_whole, parts)):
                _snapshot(repository, revision, [_siblings(name) for part in parts for name in part])
                return _in_folder(folder, parts)
        except LocalEntryNotFoundError:
            continue
    return None


def _explained(error: Exception, repository: str, local: str) -> InputError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return InputError(
            f"the data set {repository} is gated: accept its terms at https://huggingface.co/datasets/{repository},"
            f" then log in (hf auth login) or set HF_TOKEN; or use a local copy: {local}"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return InputError(
            f"there is no data set {repository} on the hub, or it is private: check the name, or set HF_TOKEN"
        )
    return InputError(
        f"the data set {repository} cannot be downloaded ({type(error).__name__}) and the cache does not hold"
        f" (all of) it; connect to the network once, or use a local copy: {local}"
    )


def _snapshot(repository: str, revision: str, wanted: list[str]) -> Path:
    """Return the folder in the cache, if it holds all files that match ``wanted``."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=wanted, local_files_only=True
        )
    )


def _is_whole(names: Sequence[str]) -> bool:
    """Return whether there are as many files as their names ``...-of-00014.parquet`` promise."""
    counts = [int(match[1]) for name in names if (match := re.search(r"-of-(\d+)\.parquet$", name))]
    return all(count == len(names) for count in counts)


def _siblings(name: str) -> str:
    """Return the pattern of the files of the same part: an interrupted download leaves some of them out."""
    path = PurePosixPath(name)
    return glob.escape(path.parent.as_posix()) + "/" + re.sub(r"\d+", "*", path.name)


def _in_folder(folder: str | os.PathLike[str], parts: tuple[list[str], list[str]]) -> Files:
    train, test = ([Path(folder, name) for name in part] for part in parts)
    return train, test


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, huggingface_hub does not tell the log how often it tried: the user gets one line in the end."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


DATASETS.register("hf")(Source(read_hub, path="required", remote=True))
