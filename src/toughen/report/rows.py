"""The rows of a comparison: each run, alone or folded with its other seeds, followed by its branches."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from toughen.report.network import Checkpoint, Network, checked_config
from toughen.run_folder import RunFolder
from toughen.statistics import Interval, SeedSummary, over_seeds, wilson_interval


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a row under one attack: of its networks together, and the Wilson interval of each."""

    seeds: SeedSummary
    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class Row:
    """A run or a branch: one network, or one for each seed of the same recipe."""

    name: str
    networks: tuple[Network, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the training of its networks."""
        return tuple(network.seed for network in self.networks)

    @property
    def method(self) -> str:
        """What the log calls it."""
        return self.networks[0].method

    @property
    def trained(self) -> float:
        """Share of the weights that train, mean over seeds."""
        return _mean(network.trained for network in self.networks)

    @property
    def seconds(self) -> float:
        """Of an epoch, mean over seeds."""
        return _mean(network.seconds for network in self.networks)

    @property
    def flops(self) -> float:
        """Of a training step relative to PGD-AT's, mean over seeds."""
        return _mean(network.flops for network in self.networks)

    def accuracy(self, attack: str, checkpoint: Checkpoint = "last") -> Accuracy | None:
        """Return the accuracy under an attack; None where not every network has met it."""
        results = [network.results(checkpoint).get(attack) for network in self.networks]
        outcomes = [result["correct"] for result in results if result is not None]
        if len(outcomes) < len(results):
            return None
        return Accuracy(
            seeds=over_seeds([sum(correct) / len(correct) for correct in outcomes]),
            intervals=tuple(wilson_interval(sum(correct), len(correct)) for correct in outcomes),
        )


@dataclass(frozen=True)
class Family:
    """A run and its branches."""

    run: Row
    branches: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The run, then its branches."""
        return (self.run, *self.branches)

    @property
    def end(self) -> Row:
        """What plain training ends at: the first branch, or the run itself where it has none."""
        return self.branches[0] if self.branches else self.run


def collect(runs: Sequence[RunFolder], *, seeds: Literal["folded", "each"]) -> tuple[Family, ...]:
    """Read runs and their branches; with ``"folded"``, runs that differ in ``train.seed`` alone become one family.

    Raises:
        InputError: A run has no evaluation yet, or a file is damaged.
    """
    for run in runs:
        checked_config(run)
    groups = _same_recipe(runs) if seeds == "folded" else [[run] for run in runs]
    short = [_common_name([_name(run) for run in group]) for group in groups]
    long = [_common_name([str(run.path) for run in group]) for group in groups]
    repeated = Counter(short)
    names = [name if repeated[name] == 1 else path for name, path in zip(short, long, strict=True)]
    return tuple(_family(name, group) for name, group in zip(names, groups, strict=True))


def _same_recipe(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs of one recipe together, at the place of the first; apart where a seed occurs twice."""
    groups: dict[str, dict[int, list[RunFolder]]] = {}
    for run in runs:
        config = checked_config(run)
        seed = (config.get("train") or {}).pop("seed", 0)
        groups.setdefault(json.dumps(config, sort_keys=True), {}).setdefault(seed, []).append(run)
    found: list[list[RunFolder]] = []
    for by_seed in groups.values():
        members = [run for same_seed in by_seed.values() for run in same_seed]
        found += [members] if len(members) == len(by_seed) else [[run] for run in members]
    return found


def _family(name: str, runs: Sequence[RunFolder]) -> Family:
    branches: dict[str, list[Network]] = {}
    for run in runs:
        for branch in run.branches():
            branches.setdefault(branch.path.name, []).append(Network.read(branch))
    return Family(
        run=Row(name, tuple(Network.read(run) for run in runs)),
        branches=tuple(Row(f"{name}/{branch}", tuple(networks)) for branch, networks in branches.items()),
    )


def _name(run: RunFolder) -> str:
    """The folder's; of those that a sweep calls by their seed, the folder's above, which says what the run is."""
    path = run.path.parent if re.fullmatch(r"seed-\d+", run.path.name) else run.path
    return path.name or str(run.path)


def _common_name(names: Sequence[str]) -> str:
    """What the names of a recipe's runs begin with: ``pgd-at`` for pgd-at-0 and pgd-at-1."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # not half of a number: run-10, run-11
    return common.rstrip("-_./ ") or names[0]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
