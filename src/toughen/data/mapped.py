"""What does not fit into memory is written once to the user's cache folder, uncompressed, and mapped from there."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from toughen.errors import InputError

_SHARE = 4  # a quarter of the memory; the rest is for the model, the decoded images and other people's work


def fits_memory(num_bytes: int) -> bool:
    """Return whether so many bytes are at most a quarter of the memory of this machine."""
    return num_bytes <= host_memory() // _SHARE


def host_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cached_copy(sources: Sequence[Path], suffix: str, num_bytes: int, write: Callable[[Path], None]) -> Path:
    """Return a file made from ``sources``: the one in the cache folder if they have not changed since, else a new one.

    Args:
        sources: Files; path, size and time of change are the key.
        suffix: Of the file, with its dot.
        num_bytes: About how large it will be.
        write: Writes it to the path that it is given. The file gets its name only once it is whole.

    Raises:
        InputError: There is too little room for it.
    """
    key = "\n".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toughen"
    path = folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if num_bytes > (free := shutil.disk_usage(folder).free):
            raise InputError(
                f"{sources[0]} is too large for memory, and its uncompressed copy ({num_bytes / 2**30:.1f} GiB) for"
                f" {folder} ({free / 2**30:.1f} GiB free); set XDG_CACHE_HOME to a folder with more room"
            )
        write(part)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; set XDG_CACHE_HOME to a folder with room") from error
    finally:
        part.unlink(missing_ok=True)
    return path


class MappedColumn:
    """The one column of an Arrow file, which stays on the disk. Worker processes are sent the path alone.

    Args:
        path: An uncompressed Arrow IPC file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._column: Any = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(0)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int, /) -> Any:
        return self._column[row]

    def __reduce__(self) -> tuple[type["MappedColumn"], tuple[Path]]:
        return MappedColumn, (self._path,)
