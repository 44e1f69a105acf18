"""Where the outcomes of an evaluation are kept while they come in, so that nothing is lost and nothing done twice."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toughen import processes
from toughen.data import Images
from toughen.durable import read_text, sealed, told, unsealed, write_text
from toughen.errors import InputError
from toughen.evaluation.outcomes import EvalResult
from toughen.run_folder import file_name

_SECONDS = 10.0  # between two writes of an unfinished attack: a SIGKILL loses no more


@dataclass
class Journal:
    """One file for each attack in a folder, whole at every moment.

    A file is taken up again when everything that decides its outcomes is as it was: name, settings, seed, batch
    size, facts, versions and kind of device. Otherwise it is replaced.

    Where several processes share an evaluation, the first one reads for all of them, and writes.

    Args:
        folder: Made when needed; that of the first process counts.
        facts: What tells this evaluation from others, as plain values: checksums of the weights and the images.
        again: Repeat what is complete already.
    """

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    reused: list[str] = field(default_factory=list, init=False)
    _written: float = field(default=0.0, init=False)

    def find(self, empty: EvalResult) -> EvalResult | None:
        """Return what is known of an attack, of which ``empty`` tells everything but the outcomes, to all processes.

        Raises:
            InputError: The file can't be read.
        """
        [(found,)] = processes.shared(partial(self._read, empty) if processes.rank() == 0 else None)
        if found is not None and found.complete:
            self.reused.append(found.attack)
        return found

    def _read(self, empty: EvalResult) -> tuple[EvalResult | None]:
        file = self._file(empty.attack)
        if not file.is_file():
            return (None,)
        try:
            found = EvalResult.from_dict(unsealed(read_text(file), file))
        except InputError as error:
            raise InputError(f"{error}; delete it to measure {empty.attack} anew") from None
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error}); delete it to measure {empty.attack} anew") from None
        if _identity(found) != _identity(empty) or (found.complete and self.again):
            return (None,)
        return (found,)

    def due(self) -> bool:
        """Whether enough time has passed to write once more."""
        return time.monotonic() - self._written > _SECONDS

    def write(self, result: EvalResult) -> None:
        """Replace the file of this attack.

        Raises:
            InputError: It can't be written.
        """
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file(result.attack), sealed(result.to_dict()) + "\n")
        self._written = time.monotonic()

    def _file(self, attack: str) -> Path:
        return self.folder / f"{file_name(attack)}.json"


def facts_of(model: nn.Module, images: Images) -> dict[str, Any]:
    """Return the checksums (SHA-256) that tell what was measured: of the weights and buffers, and of the images."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"images_sha256": images.digest(), "weights_sha256": weights.hexdigest()}


def _identity(result: EvalResult) -> list[Any]:
    """Everything on which outcomes depend, in the form that JSON gives back."""
    parts = (
        *(result.attack, result.settings, result.seed, result.batch_size, result.attack_all),
        *(result.facts, result.versions, result.device),
    )
    return list(json.loads(json.dumps(parts, default=dict)))
