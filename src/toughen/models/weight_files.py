"""Files of weights, read without running code of theirs: safetensors and torch checkpoints. Knows nothing of models."""

import re
import string
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from toughen.errors import InputError, first_line


class _Skipped:
    """Stands for a thing beside the weights: takes whatever it is given, keeps nothing and does nothing."""

    def __new__(cls, *_: object) -> "_Skipped":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What training scripts put beside the weights: numpy's numbers and arrays (its random state), argparse's settings,
# paths. None of them is built: torch's restricted unpickler is told that these names mean ``_Skipped``, whose code is
# above. (numpy's own types would not be safe here: the state of a dtype can declare bytes to be pointers.) Names are
# as files spell them; numpy 1 and Python 3.13 have other modules for the same thing.
SKIPPED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read every named tensor of a safetensors or torch file, without running code of the file.

    Args:
        file: A torch file may hold tensors in nested mappings beside plain values, numpy numbers and arrays, settings
            of argparse, and paths.

    Returns:
        The tensors, on the CPU. A tensor of a nested mapping has the keys that lead there before its own name, each
        followed by a slash: ``state_dict/conv1.weight``.

    Raises:
        InputError: The file is missing, damaged, something else, or needs a class that could run code.

    Example:
        >>> list(read_weights("checkpoint.pt"))  # doctest: +SKIP
        ['state_dict/conv1.weight', ..., 'optimizer/state/0/momentum_buffer']
    """
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{file} is a folder; give the weights file inside it")
    if not path.is_file():
        raise InputError(f"no weights file {file}")
    with path.open("rb") as stream:
        start = stream.read(64)
    safetensors = start[8:9] == b"{"  # its header is JSON, behind eight bytes that tell its length
    if reason := _no_weights(start):
        raise InputError(f"weights file {file} {reason}")
    if path.suffix == ".safetensors" and not safetensors:  # torch would trust the name
        raise InputError(f"weights file {file} is damaged, or not safetensors; if it is a torch file, rename it to .pt")
    try:
        document = load_file(path) if safetensors else _load_torch(path, zipped=start.startswith(b"PK"))
        tensors = dict(_tensors(document, "", set()))
    except UnpicklingError as error:
        raise InputError(f"weights file {file} {_refusal(error)}") from None
    except Exception as error:  # the readers of a damaged file raise whatever they stumble over
        reason = first_line(error)
        raise InputError(f"weights file {file} is damaged, or no weights file: {reason}") from None
    if not tensors:
        raise InputError(f"weights file {file} holds no named tensors, only a {type(document).__name__}")
    return tensors


def _no_weights(start: bytes) -> str | None:
    """Recognise what is often saved in the place of weights, by its first bytes."""
    if not start:
        return "is empty"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not weights; its download needs a login or a confirmation"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights; fetch them with 'git lfs pull'"
    if all(chr(byte) in string.printable for byte in start):
        return "is text, not weights"
    return None


def _load_torch(path: Path, *, zipped: bool) -> Any:
    skipped: list[Any] = [(_Skipped, name) for name in SKIPPED]
    with torch.serialization.safe_globals(skipped), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old formats, which it then reads or refuses all the same
        # mapped, so that the optimizer's state beside the weights is never read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _tensors(document: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(document, Mapping) or id(document) in seen:  # a mapping can hold itself
        return
    seen.add(id(document))
    for key, value in document.items():
        if isinstance(value, Tensor):
            # a hostile or half-written file can hold tensors without data
            if value.device.type == "cpu" and value.layout is torch.strided and not value.is_quantized:
                yield f"{path}{key}", value.detach()
        else:
            yield from _tensors(value, f"{path}{key}/", seen)


def _refusal(error: UnpicklingError) -> str:
    message = str(error)
    if needed := re.search(r"GLOBAL (\S+)", message):
        return (
            f"needs {needed[1]} to be unpickled, which may run code; where you trust the file, load it yourself and"
            " save torch.save(model.state_dict(), FILE), or safetensors"
        )
    reason = message.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0]
    return f"is damaged, or a pickle that cannot be read without running it: {reason}"
