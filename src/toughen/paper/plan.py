"""What has to be trained for a table or figure of the paper: the runs, each once, whoever needs it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toughen.config import resolve
from toughen.errors import InputError
from toughen.paper.figures import FIGURES
from toughen.paper.networks import Network, attacking, merged, networks
from toughen.paper.scales import Scale
from toughen.paper.values import num_tables, paper_rows
from toughen.sweep import Resources, Run, Sweep


@dataclass(frozen=True, order=True)
class Piece:
    """A table or a figure.

    Attributes:
        kind: ``"table"`` or ``"figure"``.
        number: As in the paper.
    """

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"

    @property
    def varies_layers(self) -> bool:
        """Whether it is about the number of layers that CLAT trains."""
        return self.kind == "figure" and FIGURES[self.number].kind == "layers"

    def needs(self) -> list[Network]:
        """Return the networks that it shows."""
        if self.kind == "figure":
            return [curve.network for curve in FIGURES[self.number].curves]
        rows = paper_rows(self.number)
        return [network for row in rows for network in (*networks(row), *([attacking(row)] if row.attacker else ()))]


def pieces(name: str) -> list[Piece]:
    """Return what a name stands for: ``5``, ``table-5``, ``figure-2``, ``all``.

    Raises:
        InputError: The paper has no such table or figure.
    """
    tables = [Piece("table", number) for number in range(1, num_tables() + 1)]
    figures = [Piece("figure", number) for number in FIGURES]
    if name == "all":
        return [*tables, *figures]
    match = re.fullmatch(r"(?:(table|figure|fig)[-_ ]?)?(\d+)", name.lower())
    wanted = match and Piece("figure" if (match[1] or "").startswith("fig") else "table", int(match[2]))
    if wanted not in (*tables, *figures):
        raise InputError(
            f"the paper has no {name!r} to reproduce; name a table (1 to {len(tables)}), a figure"
            f" ({', '.join(map(str, figures))}), or all"
        )
    return [wanted]


@dataclass(frozen=True)
class Plan:
    """What is trained, and what can't be.

    Attributes:
        sweep: The runs, by seed, so that a table can be read before the last seed is there.
        documents: The recipe of each run without its seed, as plain values, by name.
        needed_by: Pieces that need a run, by the name of the run without its seed.
        impossible: Why a network can't be had, by network.
    """

    sweep: Sweep
    documents: Mapping[str, dict[str, Any]]
    needed_by: Mapping[str, tuple[Piece, ...]]
    impossible: Mapping[Network, str]


def make_plan(
    wanted: Sequence[Piece],
    scale: Scale,
    *,
    seeds: int,
    clat: Mapping[str, Any],
    paths: Mapping[str, str],
    weights: Mapping[str, str] | None = None,
    resources: Resources | None = None,
) -> Plan:
    """Find the runs behind tables and figures.

    Args:
        wanted: Tables and figures.
        scale: How large.
        seeds: Runs of each network.
        clat: Settings of CLAT that replace the literal ones.
        paths: Local copies of data sets, by name.
        weights: Files of published weights, by their name at RobustBench.
        resources: Of each run, where Ray or SLURM trains them.

    Raises:
        InputError: A setting of ``clat`` is wrong, or is what a figure varies.
    """
    if layers := [str(piece) for piece in wanted if "k" in clat and piece.varies_layers]:
        raise InputError(f"{', '.join(layers)} vary the number of layers; leave k out of --clat, or these out")
    documents: dict[str, list[dict[str, Any]]] = {}
    needed: dict[str, list[Piece]] = {}
    impossible: dict[Network, str] = {}
    for piece in wanted:
        for network in piece.needs():
            try:
                document = network.document(scale, clat=clat, weights=weights)
            except InputError as error:
                impossible[network] = str(error)
                continue
            if network.published(scale):  # nothing to train
                continue
            name = network.run_name(scale)
            if path := paths.get(document["data"]["name"]):
                document["data"]["path"] = path
            documents.setdefault(name, []).append(document)
            needed.setdefault(name, []).append(piece)
    whole = {name: merged(found) for name, found in documents.items()}
    runs = [_run(name, document, seed) for seed in range(seeds) for name, document in whole.items()]
    title = f"paper-{scale.name}"
    sweep = Sweep(title, title, tuple(runs), resources or Resources(), retries=2)
    return Plan(sweep, whole, {name: tuple(dict.fromkeys(found)) for name, found in needed.items()}, impossible)


def _run(name: str, document: Mapping[str, Any], seed: int) -> Run:
    seeded = {**document, "train": {**document["train"], "seed": seed}}
    return Run(f"{name}/seed-{seed}", seed, {}, resolve(seeded))


def sweep_document(plan: Plan, *, seeds: int) -> dict[str, Any]:
    """Return the file for ``toughen sweep`` that trains the same runs into the same folders."""
    common = {
        section: value
        for section, value in next(iter(plan.documents.values())).items()
        if section not in ("description", "branches", "branch_epoch")
    }
    content = {
        "name": plan.sweep.name,
        "recipe": common,
        "runs": {name: _changes(document, common) for name, document in plan.documents.items()},
        "seeds": seeds,
        "resources": {"cpus": plan.sweep.resources.cpus, "gpus": plan.sweep.resources.gpus},
    }
    # as JSON, nothing in it is one object twice, which YAML would write as a reference
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _changes(document: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe sets over the common sections: of sections that are mappings, the keys that differ."""
    changes = {}
    for section, value in document.items():
        before = common.get(section)
        if value == before or section == "description":
            continue
        if isinstance(value, dict) and isinstance(before, dict) and section != "model":  # a width goes with its name
            changes[section] = {key: value.get(key) for key in {**before, **value} if before.get(key) != value.get(key)}
        else:
            changes[section] = value
    return changes
