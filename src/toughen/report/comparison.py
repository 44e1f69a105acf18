"""The comparison of runs: their rows, and how these differ. Reads run folders, renders nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from toughen.errors import InputError
from toughen.report.likeness import common_attacks
from toughen.report.network import Network
from toughen.report.rows import Accuracy, Family, Row, collect
from toughen.run_folder import RunFolder
from toughen.statistics import CONFIDENCE, PairedDifference, SeedSummary, compare_paired, compare_seeds


@dataclass(frozen=True)
class Contrast:
    """How two rows differ under one attack: over their seeds, and each pair of networks."""

    seeds: SeedSummary
    networks: tuple[PairedDifference, ...]


@dataclass(frozen=True)
class Difference:
    """How a row differs from another at the last epoch.

    Attributes:
        row: The first.
        against: What it is compared with.
        seeds: Of the pairs (of their first). Two rows of one network each are one pair, whatever their seeds; rows of
            several are paired by seed. Empty where these have none in common.
        attacks: The contrast under each attack; empty where there are no pairs.
    """

    row: Row
    against: Row
    seeds: tuple[int, ...]
    attacks: Mapping[str, Contrast]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        families: In the order given, runs of one recipe folded.
        attacks: That the last checkpoint of every network has met.
        left_out: Attacks that only some have met.
        differences: Branches against the first of their run, runs against the first given; see ``compare_runs``.
    """

    families: tuple[Family, ...]
    attacks: tuple[str, ...]
    left_out: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Each run followed by its branches."""
        return tuple(row for family in self.families for row in family.rows)

    @property
    def first(self) -> Network:
        """The first network; all others were measured like it."""
        return self.families[0].run.networks[0]

    @property
    def num_images(self) -> dict[str, int]:
        """Test images of each attack."""
        return {attack: self.first.last[attack]["n"] for attack in self.attacks}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; accuracies and their differences are shares in [0, 1], not percent."""
        return {
            "data": self.first.config["data"]["name"],
            "threat": self.first.config["threat"],
            "confidence": CONFIDENCE,
            "attacks": {
                attack: {"n": n, "settings": self.first.last[attack]["settings"]}
                for attack, n in self.num_images.items()
            },
            "left_out": list(self.left_out),
            "rows": [_row_dict(row, self.attacks) for row in self.rows],
            "differences": [_difference_dict(difference) for difference in self.differences],
        }


def compare_runs(runs: Iterable[RunFolder], *, seeds: Literal["folded", "each"] = "folded") -> Comparison:
    """Put runs side by side, each followed by its branches, and say how they differ.

    Differences are taken between networks at the end of their training: each branch against the first branch of its
    run (the plain continuation, in the recipes of this package), and what a run ends at (its first branch, or itself
    where it has none) against what the first run given ends at.

    Args:
        runs: In the order of the rows.
        seeds: ``"folded"`` makes one row of runs whose recipes differ in ``train.seed`` alone, and pairs rows by seed;
            ``"each"`` keeps every run on its own. Runs that repeat a seed are not folded.

    Raises:
        InputError: No runs, a run has no evaluation yet, or the runs were evaluated with different attacks, images or
            threat models.
    """
    folders = list(runs)
    if not folders:
        raise InputError("nothing to compare: give at least one run folder")
    families = collect(folders, seeds=seeds)
    networks = [network for family in families for row in family.rows for network in row.networks]
    attacks = common_attacks(networks)
    met = {attack for network in networks for attack in network.last}
    return Comparison(families, attacks, tuple(sorted(met.difference(attacks))), tuple(_differences(families, attacks)))


def _differences(families: Sequence[Family], attacks: Sequence[str]) -> Iterator[Difference]:
    for family in families:
        if family is not families[0]:
            yield _difference(family.end, families[0].end, attacks)
        for branch in family.branches[1:]:
            yield _difference(branch, family.end, attacks)


def _difference(row: Row, against: Row, attacks: Sequence[str]) -> Difference:
    pairs = _pairs(row, against)
    contrasts = {attack: _contrast(pairs, attack) for attack in attacks} if pairs else {}
    return Difference(row, against, tuple(pairs), contrasts)


def _pairs(row: Row, against: Row) -> dict[int, tuple[Network, Network]]:
    """The networks to compare with one another, by the seed of the first."""
    if len(row.networks) == len(against.networks) == 1:
        return {row.seeds[0]: (row.networks[0], against.networks[0])}
    others = dict(zip(against.seeds, against.networks, strict=True))
    return {network.seed: (network, others[network.seed]) for network in row.networks if network.seed in others}


def _contrast(pairs: Mapping[int, tuple[Network, Network]], attack: str) -> Contrast:
    outcomes = {seed: [network.last[attack]["correct"] for network in pair] for seed, pair in pairs.items()}
    return Contrast(
        seeds=compare_seeds(
            {seed: sum(first) / len(first) for seed, (first, _) in outcomes.items()},
            {seed: sum(second) / len(second) for seed, (_, second) in outcomes.items()},
        ),
        networks=tuple(compare_paired(first, second) for first, second in outcomes.values()),
    )


def _row_dict(row: Row, attacks: Sequence[str]) -> dict[str, Any]:
    def plain(accuracy: Accuracy | None) -> dict[str, Any] | None:
        return None if accuracy is None else asdict(accuracy)

    return {
        "run": row.name,
        "folders": [network.path for network in row.networks],
        "method": row.method,
        "seeds": list(row.seeds),
        "epochs": [network.epochs for network in row.networks],
        "trained_share": row.trained,
        "seconds_per_epoch": row.seconds,
        "flops_relative_to_pgd_at": row.flops,
        "accuracies": {
            attack: {"last": plain(row.accuracy(attack)), "best": plain(row.accuracy(attack, "best"))}
            for attack in attacks
        },
    }


def _difference_dict(difference: Difference) -> dict[str, Any]:
    return {
        "run": difference.row.name,
        "against": difference.against.name,
        "seeds": list(difference.seeds),
        "attacks": {attack: asdict(contrast) for attack, contrast in difference.attacks.items()},
    }
