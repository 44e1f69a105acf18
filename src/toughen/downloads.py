"""Whether what came from the Hugging Face hub is what the hub has. Knows nothing of what is in the files."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from toughen.errors import InputError

_CHUNK = 2**20


def check_hub_files(paths: Iterable[Path]) -> None:
    """Compare files in huggingface_hub's cache with the checksums that the hub gave for them.

    In the cache, the content of a file is called by its checksum: SHA-256 for large files, git's SHA-1 for small ones;
    huggingface_hub itself compares the size alone. Where its files have other names, there is nothing to compare with.

    Raises:
        InputError: One differs. All that do are removed, so that nobody reads them later.
    """
    if wrong := [path for path in paths if _differs(path)]:
        for path in wrong:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise InputError(
            f"{wrong[0]} was not what the hub has: its checksum differs; it is removed, so download it again"
        )


def _differs(path: Path) -> bool:
    content = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", content.name):
        found = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", content.name):
        found = hashlib.sha1(b"blob %d\0" % content.stat().st_size, usedforsecurity=False)
    else:
        return False
    with content.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest() != content.name
