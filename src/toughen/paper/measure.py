"""The figures of a trained network that the paper's tables hold, measured once and kept beside the runs."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from toughen import data as datasets
from toughen import models
from toughen.config import recipe_of, resolve
from toughen.criticality import CriticalityReport, analyze
from toughen.data import DataSettings, DataSplits
from toughen.durable import read_text, sealed, unsealed, write_text
from toughen.engine import Recipe, checkpoint, create_model, pick_device
from toughen.engine.progress import attack_progress
from toughen.engine.provenance import provenance
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, Journal, evaluate, facts_of, parse_attack, transfer_from
from toughen.evaluation.autoattack import Published, Square, paper
from toughen.paper.networks import MIXED, Network, attacking, networks
from toughen.paper.scales import PAPER_EPOCHS, Scale
from toughen.paper.values import PaperRow, Value, paper_rows
from toughen.run_folder import RunFolder

AUTOATTACK = "autoattack"
_ATTACKS = {
    "FAB": "fab",
    "StAdv": "stadv",
    "Pixle": "pixle",
    # a true l2 ball of radius 0.03 is what the table says, and next to harmless
    "PGD-L2 eps=0.03": "pgd-l2-10:eps=0.03",
    "PGD-Linf eps=0.03 50 steps": "pgd-50",
    "PGD-Linf eps=0.03 100 steps": "pgd-100",
}
_METRICS = {"clean": "clean", "pgd10": "pgd-10", "adversarial": "pgd-10", "autoattack": AUTOATTACK}


class Measured(NamedTuple):
    """A figure, and of how many test images it is; 0 where it is of none."""

    value: Value
    n: int = 0


@dataclass(frozen=True)
class Loaded:
    """A network with its images and its recipe, ready to be attacked."""

    model: nn.Module
    splits: DataSplits
    recipe: Recipe


@dataclass
class Bench:
    """Measures the networks of one folder of runs.

    Args:
        out: The folder of the runs; measurements go to ``measured`` in it.
        scale: How large.
        clat: Settings of CLAT that replace the literal ones.
        paths: Local copies of data sets, by name.
        weights: Files of published weights, by their name at RobustBench.
        checkpoint: ``"last"`` or ``"best"`` (on validation images).
    """

    out: Path
    scale: Scale
    clat: Mapping[str, Any]
    paths: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = "last"
    _splits: tuple[DataSettings, DataSplits] | None = field(default=None, init=False)
    _networks: tuple[Sequence[Network], int, Loaded] | None = field(default=None, init=False)
    _transferred: dict[tuple[Any, ...], tuple[dict[str, float], int]] = field(default_factory=dict, init=False)
    _accuracies: dict[tuple[str, str, int, int | None], tuple[float, int]] = field(default_factory=dict, init=False)

    def values(self, row: PaperRow, seed: int) -> dict[str, Measured]:
        """Return what stands for a row's values: percent, seconds, or numbers of layers.

        Raises:
            InputError: A network of it is not trained, or its weights can't be had.
        """
        return {metric: self._value(row, metric, seed) for metric in row.values}

    def seeds_of(self, row: PaperRow, seeds: Sequence[int]) -> Sequence[int]:
        """Return of which seeds a row has networks of its own: published weights are the same for all."""
        return seeds[:1] if all(network.published(self.scale) for network in networks(row)) else seeds

    def num_samples(self, row: PaperRow, metric: str) -> int | None:
        """Return on how many test images a metric is measured; None is all."""
        on_all = _METRICS.get(metric) in ("clean", "pgd-10") or metric == "blackbox_pgd"
        return None if on_all and not row.attack else self.scale.samples

    def run(self, network: Network, seed: int) -> RunFolder:
        """Open the run of a network.

        Raises:
            InputError: It is not trained yet.
        """
        folder = RunFolder(self.out / network.run_name(self.scale) / f"seed-{seed}")
        branch = network.branch(self.scale)
        folder = folder if branch is None else folder.branch(branch)
        if not folder.finished:
            raise InputError(f"{folder.path} is not trained")
        return RunFolder.open(folder.path)

    def trunk(self, network: Network, seed: int) -> RunFolder:
        """Open the run that a network's branch began from.

        Raises:
            InputError: The network is not trained yet.
        """
        self.run(network, seed)
        return RunFolder.open(self.out / network.run_name(self.scale) / f"seed-{seed}")

    # -- accuracies -------------------------------------------------------------------------------

    def accuracy(self, behind: Sequence[Network], name: str, seed: int, *, samples: int | None) -> tuple[float, int]:
        """Return the accuracy of a network, or of a mixture of two, under an attack, in percent; and its n."""
        place = "+".join(map(self._name, behind))
        if (known := self._accuracies.get((place, name, seed, samples))) is not None:
            return known  # several tables have the same cells
        loaded = self._loaded(behind, seed)
        recipe, images = loaded.recipe, loaded.splits.test.subset(slice(samples))
        kept = self.out / "measured" / place / f"seed-{seed}" / self.checkpoint
        if len(behind) == 1 and samples is None and not behind[0].published(self.scale):
            kept = self.run(behind[0], seed).evals(self.checkpoint)  # where the end of the run has put its own
            facts = {"checkpoint": self.checkpoint, "epoch": self._epoch(behind[0], seed)}
        else:
            facts = {"alpha": MIXED} if len(behind) > 1 else {}
        with attack_progress() as progress:
            found = evaluate(
                loaded.model,
                datasets.in_order(images, batch_size=recipe.test_batch_size, device=self._device),
                [self._attack(name, recipe)],
                seed=recipe.train.seed,
                batch_size=recipe.test_batch_size,
                journal=Journal(kept, {**facts, **facts_of(loaded.model, images)}),
                progress=progress,
            )
        measured = 100 * found[name].accuracy, found[name].n
        self._accuracies[place, name, seed, samples] = measured
        return measured

    def _epoch(self, network: Network, seed: int) -> int:
        epochs = {found["epoch"] for found in self.run(network, seed).evaluations(self.checkpoint).values()}
        return int(epochs.pop())

    def _attack(self, name: str, recipe: Recipe) -> EvalAttack:
        if name != AUTOATTACK:
            return parse_attack(name, threat=recipe.threat, step_size=recipe.test_step_size)
        return EvalAttack(AUTOATTACK, tuple((stage, self._scaled(one)) for stage, one in paper(recipe.threat)))

    def _scaled(self, search: Published) -> Published:
        """Return an attack of AutoAttack at the length of the scale."""
        if isinstance(search, Square):
            return replace(search, queries=self.scale.queries)
        return replace(search, steps=self.scale.steps)  # type: ignore[call-arg]  # all others have them

    def _loaded(self, behind: Sequence[Network], seed: int) -> Loaded:
        """Load a network, or the mixture of two; the one before is still there, since rows have several cells."""
        if self._networks is not None and self._networks[:2] == (behind, seed):
            return self._networks[2]
        loaded = self._one(behind[-1], seed)
        if len(behind) > 1:
            shape = loaded.splits.train.shape
            accurate = self._one(behind[0], seed).model
            loaded = replace(loaded, model=models.mix(accurate, loaded.model, alpha=MIXED, image_shape=shape))
        self._networks = behind, seed, loaded
        return loaded

    def _one(self, network: Network, seed: int) -> Loaded:
        published = network.published(self.scale)
        if published:
            document = network.document(self.scale, clat=self.clat, weights=self.weights)
            if path := self.paths.get(document["data"]["name"]):
                document["data"]["path"] = path
            recipe = resolve(document)
        else:
            recipe = recipe_of(self.run(network, seed))
        splits = self._images(replace(recipe.data, extra=None))
        model = create_model(recipe.model, splits, start_weights=published)
        if not published:
            checkpoint.load(self.run(network, seed).checkpoints / self.checkpoint, model)
        return Loaded(model.to(self._device), splits, recipe)

    def _images(self, settings: DataSettings) -> DataSplits:
        if self._splits is None or self._splits[0] != settings:
            self._splits = settings, datasets.load(settings)
        return self._splits[1]

    def circumstances(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return under which circumstances this is measured, as plain values."""
        here = provenance(seed=0, device=torch.device(self._device), precision="32-true")
        return {
            "scale": self.scale.name,
            "seeds": list(seeds),
            "checkpoint": self.checkpoint,
            "clat": dict(self.clat),
            "local copies": sorted(self.paths),
            "differs": list(self.scale.differs),
            "provenance": {key: value for key, value in here.items() if key != "seed"},
        }

    @cached_property
    def _device(self) -> str:
        return pick_device("auto")

    # -- values of a row --------------------------------------------------------------------------

    def _value(self, row: PaperRow, metric: str, seed: int) -> Measured:
        behind = networks(row)
        if metric.startswith("blackbox"):
            return self._blackbox(row, metric, seed)
        if metric in _METRICS or metric == "adversarial_delta":
            name = _ATTACKS[row.attack] if row.attack else _METRICS[metric]
            samples = self.num_samples(row, metric)
            value, n = self.accuracy(behind, name, seed, samples=samples)
            if metric == "adversarial_delta":
                before = replace(behind[0], going_on="base")
                value -= self.accuracy((before,), name, seed, samples=samples)[0]
            return Measured(value, n)
        [network] = behind
        if metric == "epoch_time_s":
            return Measured(statistics.median(entry["seconds"] for entry in self.trunk(network, seed).log()))
        if metric == "trainable_share":
            return Measured(100 * float(self.run(network, seed).log()[-1]["trainable_share"]))
        if row.batch_size:
            report, seconds = self._selection(network, seed, row.batch_size)
            return Measured(seconds if metric == "time_s" else [one.index for one in report.top(5)])
        return Measured(self._critical(row, network, seed))

    def _critical(self, row: PaperRow, network: Network, seed: int) -> list[int]:
        """Return the numbers of the layers that were found the most critical, or chosen, in a run."""
        run = self.run(network, seed)
        reports = run.reports()
        if not row.epoch:
            return [layer.index for layer in CriticalityReport.from_dict(reports[min(reports)]).top(5)]
        epoch = self.scale.epochs(row.epoch)
        if epoch not in reports:
            raise InputError(f"{run.path} chose no layers at epoch {epoch} of {self.scale.epochs(PAPER_EPOCHS)}")
        found = reports[epoch]
        numbers = {layer["name"]: layer["index"] for layer in found["layers"]}
        return [numbers[name] for name in found["selected"]]

    def _selection(self, network: Network, seed: int, count: int) -> tuple[CriticalityReport, float]:
        """Measure criticality where CLAT would begin, on so many images, with the seconds that it takes."""
        run = self.trunk(network, seed)
        recipe = recipe_of(run)
        splits = self._images(replace(recipe.data, extra=None))
        model = create_model(recipe.model, splits, start_weights=False)
        checkpoint.load(run.checkpoints / "last", model)
        file = self._kept(network) / f"seed-{seed}" / f"selection-{count}.json"
        facts = facts_of(model, splits.test)
        if (kept := _read(file, facts)) is None:
            model.to(self._device)
            images = datasets.probe(
                splits.train, count=count, seed=seed, position=0, device=self._device, batch_size=count
            )
            batches = [(batch.x, batch.y) for batch in images]
            analyze(model, batches, recipe.attack, seed=seed)  # what only a first call has to do is not timed
            started = time.perf_counter()
            report = analyze(model, batches, recipe.attack, seed=seed)
            kept = {"seconds": time.perf_counter() - started, "report": report.to_dict()}
            _write(file, facts, kept)
        return CriticalityReport.from_dict(kept["report"]), float(kept["seconds"])

    # -- black-box --------------------------------------------------------------------------------

    def _blackbox(self, row: PaperRow, metric: str, seed: int) -> Measured:
        [victim], attacker = networks(row), attacking(row)
        self.run(victim, seed)
        name = "pgd-10" if metric == "blackbox_pgd" else AUTOATTACK
        alike = [one for one in paper_rows(row.table) if (one.dataset, one.attacker) == (row.dataset, row.attacker)]
        victims = dict.fromkeys(network for one in alike for network in networks(one) if self._trained(network, seed))
        stands, n = self._shown(attacker, tuple(victims), name, seed, samples=self.num_samples(row, metric))
        return Measured(100 * stands[self._name(victim)], n)

    def _shown(
        self, attacker: Network, victims: Sequence[Network], name: str, seed: int, *, samples: int | None
    ) -> tuple[dict[str, float], int]:
        """Show the images that fool one network to others; on which share of them each stands, and their number."""
        key = attacker, tuple(victims), name, seed, samples
        if (known := self._transferred.get(key)) is not None:
            return known
        made_on = self._one(attacker, seed)
        shown_to = {self._name(network): self._one(network, seed).model for network in victims}
        images = made_on.splits.test.subset(slice(samples))
        attack = self._attack(name, made_on.recipe)
        facts = {
            "attack": json.loads(json.dumps(attack.settings(), default=dict)),  # as the file gives it back
            "made on": facts_of(made_on.model, images),
            **{victim: facts_of(model, images) for victim, model in shown_to.items()},
        }
        file = self._kept(attacker) / f"seed-{seed}" / self.checkpoint / f"{name}-elsewhere.json"
        if (kept := _read(file, facts)) is None:
            with attack_progress() as progress:
                found = transfer_from(
                    made_on.model,
                    shown_to,
                    datasets.in_order(images, batch_size=made_on.recipe.test_batch_size, device=self._device),
                    attack,
                    seed=seed,
                    batch_size=made_on.recipe.test_batch_size,
                    progress=progress,
                )
            kept = {"n": len(images), "accuracy": {one: sum(right) / len(right) for one, right in found.items()}}
            _write(file, facts, kept)
        self._transferred[key] = kept["accuracy"], int(kept["n"])
        return self._transferred[key]

    def _trained(self, network: Network, seed: int) -> bool:
        try:
            self.run(network, seed)
        except InputError:
            return False
        return True

    def _kept(self, network: Network) -> Path:
        return self.out / "measured" / self._name(network)

    def _name(self, network: Network) -> str:
        name = network.run_name(self.scale)  # which says already how published weights go on
        return name if network.from_published(self.scale) else f"{name}-{network.going_on}"


def _read(file: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept of the same networks and images, or None."""
    kept = unsealed(read_text(file), file) if file.is_file() else {}
    return kept if kept.get("facts") == facts else None


def _write(file: Path, facts: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, sealed({"facts": dict(facts), **found}) + "\n")
