"""What came from the hub is compared with the checksum that names it in the cache."""

import hashlib
from pathlib import Path

import pytest

from toughen.downloads import check_hub_files
from toughen.errors import InputError

CONTENT = b"weights"
NAMES = {
    "sha256": hashlib.sha256(CONTENT).hexdigest(),
    "git": hashlib.sha1(b"blob 7\0" + CONTENT).hexdigest(),
}


def cached(folder: Path, blob: str, content: bytes) -> Path:
    (folder / blob).write_bytes(content)
    (folder / "model.safetensors").symlink_to(folder / blob)
    return folder / "model.safetensors"


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_that_is_what_the_hub_has_passes_and_a_changed_one_does_not(kind: str, tmp_path: Path) -> None:
    file = cached(tmp_path, NAMES[kind], CONTENT)
    check_hub_files([file])
    (tmp_path / NAMES[kind]).write_bytes(b"weighty")
    with pytest.raises(InputError, match=r"model\.safetensors was not what the hub has: its checksum differs"):
        check_hub_files([file])
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_names_its_files_otherwise_gives_nothing_to_compare_with(tmp_path: Path) -> None:
    check_hub_files([cached(tmp_path, "blob", CONTENT)])
