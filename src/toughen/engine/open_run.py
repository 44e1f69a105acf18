"""How a run gets its folder: a new one, or the one that it began in, on the same images."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from toughen import processes
from toughen.data import DataSplits
from toughen.engine import checkpoint
from toughen.engine.device import pick_precision
from toughen.engine.provenance import provenance
from toughen.engine.recipe import Recipe
from toughen.errors import InputError
from toughen.run_folder import RunFolder


def check_alike(recipe: Recipe, data: DataSplits) -> None:
    """Stop where processes were started with unlike recipes or images; paths may differ between machines.

    Raises:
        InputError: Names the first setting that differs.
    """
    if processes.count() == 1:
        return
    for mine in ({"recipe": recipe.document()}, {"images": data.identity()}):
        first, *others = (dict(_settings(one)) for one in processes.gathered(mine))
        for other in others:
            unlike = [name for name in (*first, *other) if first.get(name) != other.get(name)]
            if unlike:
                name = unlike[0]
                raise InputError(
                    f"the processes differ in {name} ({first.get(name)} and {other.get(name)}); start all of them with"
                    " the same command, on the same data"
                )


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif name not in ("path", "weights"):
            yield prefix + name, value


def create_run(out: Path | str | None, recipe: Recipe, data: DataSplits, device: torch.device) -> RunFolder:
    """Make the folder of a new run, with where it comes from.

    Raises:
        InputError: It can't be written to, or holds a run already.
    """
    folder = Path(out) if out else RunFolder.free(f"{recipe.model.name}-{recipe.data.name}")
    facts = provenance(seed=recipe.train.seed, device=device, precision=pick_precision(recipe.train))
    facts |= {"processes": processes.count(), "images": data.identity()}
    return RunFolder.create(folder, recipe.document(), facts)


def open_run(out: Path | str | None, data: DataSplits) -> RunFolder:
    """Open the folder of a run that is to go on.

    Raises:
        InputError: It is none, its checkpoints are gone, or it began on other images.
    """
    folder = RunFolder.open(Path(out or ""))
    _check_checkpoints(folder)
    began = folder.provenance().get("images")
    if began is not None and began != data.identity():
        raise InputError(
            f"run {folder.path} began on other images ({began['name']}, {began['counts'][0]} for training)"
            f" than these ({data.name}, {len(data.train)}); if they were your own, go on in Python:"
            " Trainer(recipe, data=..., resume=True)"
        )
    return folder


def _check_checkpoints(folder: RunFolder) -> None:
    """Refuse to begin anew, over its log, a run whose checkpoints somebody removed."""
    if checkpoint.exists(folder.checkpoints / "last") or folder.parent_run is not None:
        return  # a branch begins again where its run branched
    # a log of one epoch is no sign: it is written before the first checkpoint, and a kill may come between them
    if not folder.checkpoints.is_dir() or len(folder.log()) > 1:
        raise InputError(
            f"run {folder.path} has lost its checkpoints: {folder.checkpoints / 'last'} is not there; copy it back from"
            " a backup, or begin the run anew with another --out"
        )
