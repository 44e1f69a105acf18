"""What a run is: the settings that a recipe file resolves to, each checked when it is made."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from toughen.attacks import PGD
from toughen.criticality import CriticalityOptions
from toughen.data import AUGMENTS, Augmentation, DataSettings
from toughen.errors import InputError
from toughen.evaluation import parse_attack
from toughen.methods import Stack, Wrapper
from toughen.models import MixtureOptions
from toughen.objectives import METHODS, AdaptiveSmoothing, Objective
from toughen.registry import Registry
from toughen.types import ThreatModel

Device = Literal["auto", "cpu", "cuda"]
Schedule = Literal["cosine", "piecewise", "cyclic", "onecycle", "auto", "constant"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network.

    Args:
        name: A name of ``toughen list models``, or another spec of ``toughen.models.create``.
        width: Channels of the first stage; None is the published network's.
        pretrained: Start from the weights that the source of the network publishes.
        weights: Start from this file: safetensors, or a torch checkpoint that holds tensors.
        classifier: ``"new"`` keeps everything of these weights but a last layer for other classes.
        mean: Channel means that the network subtracts, in [0, 1]; None is those that belong to its weights, else the
            training data's.
        std: Channel standard deviations; None as for ``mean``.
    """

    name: str
    width: int | None = None
    pretrained: bool = False
    weights: str | None = None
    classifier: Literal["loaded", "new"] = "loaded"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def anchored(self) -> "ModelSettings":
        """Return the same settings with absolute paths, so that they mean the same from another folder."""
        return self if self.weights is None else replace(self, weights=str(Path(self.weights).expanduser().absolute()))


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(MixtureOptions):
    """An accurate and a robust network, mixed by a mixing network that is to be trained; see ``toughen.models.mix``.

    In a recipe each of the two may also be given as a run folder, or one of its checkpoints. What is stored is the
    network and the file of its weights, so that a finished run can be read without the runs that it began with.

    Args:
        accurate: The network for clean images.
        robust: The network for attacked ones.
        name: What recipes call all of this.

    Raises:
        InputError: A network comes without weights; see ``MixtureOptions`` for the rest.
    """

    accurate: ModelSettings
    robust: ModelSettings
    name: Literal["adaptive_smoothing"] = "adaptive_smoothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("accurate", "robust"):
            network: ModelSettings = getattr(self, part)
            if network.weights is None and not network.pretrained and not network.name.startswith("hub/"):
                raise InputError(
                    f"model.{part} is {network.name} without weights, and a mixture does not train it; give a run"
                    " folder, or add weights=FILE or pretrained=true"
                )

    def anchored(self) -> "MixtureSettings":
        """See ``ModelSettings.anchored``."""
        return replace(self, accurate=self.accurate.anchored(), robust=self.robust.anchored())


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to optimise.

    Args:
        epochs: Length of the run, and of the learning-rate schedule.
        batch_size: Images per step, of all processes together; the last, smaller batch of an epoch is dropped.
        accumulate: In how many parts a process takes its images of a step, where memory has no room for all at once;
            their gradients are added up. Batch norm in train mode sees a part at a time.
        batch_norm: Where several processes train, whether batch norm in train mode takes its statistics over all
            (``"sync"``, as one process would) or over each one's own images (``"local"``; running ones are averaged).
        strategy: Where several processes train: each holds everything and exchanges gradients (``"ddp"``), or weights,
            gradients and momentum are dealt out to them (``"fsdp"``), for networks that don't fit; not all methods can.
        optimizer: ``"sgd"`` with momentum, or ``"adamw"``.
        lr: Initial (cosine, piecewise, auto, constant) or largest (cyclic, onecycle) learning rate.
        momentum: Of SGD.
        nesterov: Whether SGD looks ahead.
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        norm_decay: Whether it acts on scale and shift of batch norm and its like too (``"include"``).
        schedule: ``"cosine"`` from lr to 0; ``"piecewise"`` multiplies by ``gamma`` at each of ``milestones``;
            ``"cyclic"`` climbs linearly from 0 to lr at ``peak`` and back; ``"onecycle"`` climbs from lr/25 and falls
            to lr/250,000 along cosines; ``"auto"`` halves it where validation says so (``auto_rate``);
            ``"constant"``. Applied at every step.
        milestones: Shares of the run, in (0, 1).
        gamma: Factor at a milestone.
        peak: Share of the run at which the cyclic and the one-cycle schedule are highest, in (0, 1).
        seed: Of initial weights, order, augmentation, random starts and random selection.
        patience: Early stopping: the run ends after so many epochs without a better robust validation accuracy; None
            never does.
        max_drop: Guard against catastrophic overfitting: when robust validation accuracy, in [0, 1], falls by more than
            this between two validations, the run ends as it was at the first of them; None never does.
        validate_every: Epochs between validations.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: ``"auto"`` is bf16-mixed on CUDA and 32-true elsewhere.
        compile: Whether ``torch.compile`` takes over the network's forward. It works for a minute or two at the start
            and after each selection; results are equal up to rounding.
        checkpoint_steps: Steps between extra checkpoints inside an epoch; None writes one per epoch.
        logger: Where the numbers of each epoch go beside ``log.jsonl``: ``"tensorboard"`` (in the run folder),
            ``"wandb"``, ``"trackio"`` or ``"mlflow"``, each an extra of the same name.
        nonfinite: What to do where a gradient is not finite. The step is left out in any case; ``"stop"`` then ends the
            run and keeps the batch for inspection, ``"skip"`` counts it in the log and goes on.

    Raises:
        InputError: A number is out of its range.
    """

    epochs: int
    batch_size: int = 128
    accumulate: int = 1
    batch_norm: Literal["sync", "local"] = "sync"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    norm_decay: Literal["include", "exclude"] = "include"
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    peak: float = 0.4
    seed: int = 0
    patience: int | None = None
    max_drop: float | None = None
    validate_every: int = 1
    device: Device = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool = False
    checkpoint_steps: int | None = None
    logger: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "patience", "validate_every", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"train.{name} is {value}; it must be at least 1")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"train.{name} is {value}; it must be a finite number >= 0")
        if not all(0 < share < 1 for share in (*self.milestones, self.peak)):
            raise InputError(f"train.milestones {list(self.milestones)} and peak {self.peak} must lie between 0 and 1")
        if self.max_drop is not None and not 0 < self.max_drop < 1:
            raise InputError(f"train.max_drop is {self.max_drop}; it must lie between 0 and 1, for example 0.2")
        if self.schedule == "auto" and self.validate_every != 1:
            raise InputError(
                f"train.schedule=auto looks at every epoch's validation, but validate_every is {self.validate_every};"
                " set it to 1"
            )
        if self.compile and self.strategy == "fsdp":
            raise InputError("train.compile does not go with train.strategy=fsdp; leave one of them out")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise InputError("train.nesterov needs optimizer='sgd' and a momentum above 0")
        if self.seed < 0:
            raise InputError(f"train.seed is {self.seed}; it must be >= 0")

    def lr_at(self, progress: float) -> float:
        """Return the learning rate after a share ``progress`` in [0, 1] of the schedule."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        if self.schedule == "piecewise":
            return self.lr * self.gamma ** sum(progress >= share for share in self.milestones)
        if self.schedule == "cyclic":
            return self.lr * min(progress / self.peak, (1 - progress) / (1 - self.peak))
        if self.schedule == "onecycle":
            low, high, rising = self.lr / 25, self.lr, progress < self.peak
            start, end = (low, high) if rising else (high, low / 1e4)
            share = progress / self.peak if rising else (progress - self.peak) / (1 - self.peak)
            return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
        return self.lr


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What the end of a run measures on test images, with the threat model and step size of the run.

    Args:
        attacks: Names of ``toughen list attacks``.
        samples: First test images to use; None is all.
        step_size: Of PGD, in pixel units; None is that of the training attack.

    Raises:
        InputError: No attack or one named twice, no samples, or a negative step size.
    """

    attacks: tuple[str, ...] = ("clean", "pgd-20")
    samples: int | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise InputError(f"evaluate.attacks is {list(self.attacks)}; name at least one attack, and each once")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"evaluate.samples is {self.samples}; it must be at least 1")
        if self.step_size is not None and not 0 <= self.step_size < math.inf:
            raise InputError(f"evaluate.step_size is {self.step_size}; it must be a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
        description: What the recipe is for; its first line is shown in lists.
        branch_epoch: With branches: the epoch at which this run stops and they begin.
        branches: Runs that continue this one from there, by name.
    """

    description: str = ""
    model: ModelSettings | MixtureSettings
    data: DataSettings
    threat: ThreatModel
    attack: PGD
    method: Stack
    train: TrainSettings
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    branch_epoch: int | None = None
    branches: Mapping[str, "Recipe"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.branches) != (self.branch_epoch is not None):
            raise InputError("branches and branch_epoch go together: give both or neither")
        if self.branch_epoch is not None and not 1 <= self.branch_epoch < self.train.epochs:
            raise InputError(
                f"branch_epoch is {self.branch_epoch}; with train.epochs={self.train.epochs} it must be "
                f"1 to {self.train.epochs - 1}; set both"
            )
        if isinstance(self.model, MixtureSettings) and not isinstance(self.method.methods[0], AdaptiveSmoothing):
            raise InputError(
                f"{self.method.label} would train both networks of a mixture, which are to stay as they are; train them"
                " before, in runs of their own, and the mixture with adaptive-smoothing"
            )
        for method in self.method.methods:
            if self.train.accumulate > 1 and not method.takes_parts:
                raise InputError(
                    f"{method.label} does not go with train.accumulate={self.train.accumulate}: it carries a"
                    " perturbation from one use of a batch to the next; set it to 1"
                )
            if self.train.strategy == "fsdp" and not method.shards:
                able = ", ".join(sorted(name for name, kind in METHODS.items() if getattr(kind, "shards", False)))
                raise InputError(
                    f"{method.label} does not go with train.strategy=fsdp, which deals the weights out; use ddp, or"
                    f" methods that can: {able}"
                )
        for name, branch in self.branches.items():
            self._check_branch(name, branch)
        for name in self.evaluate.attacks:
            parse_attack(name, threat=self.threat, step_size=self.test_step_size)

    def _check_branch(self, name: str, branch: "Recipe") -> None:
        if branch.train.epochs <= (self.branch_epoch or 0):
            raise InputError(
                f"branch {name!r} sets train.epochs to {branch.train.epochs}; "
                f"it begins at branch_epoch={self.branch_epoch}, so it must be larger"
            )
        if branch.train.optimizer != self.train.optimizer:
            raise InputError(
                f"branch {name!r} sets train.optimizer to {branch.train.optimizer!r}; "
                f"it continues with the momentum of its run, so it must stay {self.train.optimizer!r}"
            )
        if (branch.threat, branch.evaluate.attacks, branch.evaluate.samples, branch.test_step_size) != (
            self.threat,
            self.evaluate.attacks,
            self.evaluate.samples,
            self.test_step_size,
        ):
            raise InputError(
                f"branch {name!r} sets threat or evaluate; both must stay as in its run, with which it is compared"
            )

    @property
    def stop_epoch(self) -> int:
        """The epoch at which this run itself ends."""
        return self.branch_epoch or self.train.epochs

    @property
    def test_step_size(self) -> float:
        """The step size of PGD on test images."""
        return self.attack.step_size if self.evaluate.step_size is None else self.evaluate.step_size

    @property
    def test_batch_size(self) -> int:
        """Images per batch outside training; it decides the random starts of attacks together with the seed."""
        return max(self.train.batch_size, 250)

    def document(self) -> dict[str, Any]:
        """Return every setting as a plain value, defaults included, as ``config.yaml`` stores it.

        A run so means the same when defaults change. ``toughen.config.resolve`` makes the recipe again.
        """
        sections: dict[str, Any] = {
            "description": self.description,
            "model": {"name": self.model.name, **asdict(self.model.anchored())},
            "data": {
                **asdict(self.data.anchored()),
                "augment": [_named(member, AUGMENTS) for member in self.data.augmentations],
            },
            "threat": asdict(self.threat),
            "attack": {"name": "pgd", **{key: v for key, v in asdict(self.attack).items() if key != "threat"}},
            "method": [_named(method, METHODS) for method in self.method.methods],
            "train": asdict(self.train),
            "evaluate": asdict(self.evaluate),
        }
        plain: dict[str, Any] = json.loads(json.dumps(sections, default=_refuse))  # tuples become lists
        if self.branches:
            branches = {name: branch.document() for name, branch in self.branches.items()}
            plain["branch_epoch"] = self.branch_epoch
            plain["branches"] = {name: _changes(plain, branch) for name, branch in branches.items()}
        return plain


def _named(member: Objective | Wrapper | Augmentation, registry: Registry[Any]) -> dict[str, Any]:
    settings = {f.name: getattr(member, f.name) for f in fields(member)}  # type: ignore[arg-type]
    kind = type(member)
    # whoever reads the file later must find a class of the user's own, registered or not
    own = not kind.__module__.startswith("toughen.")
    return {"name": f"{kind.__module__}:{kind.__name__}" if own else registry.name_of(kind), **settings}


def _refuse(value: Any) -> Any:
    """Write a nested settings object as a mapping; a rule of the user's own has no name that a file could hold."""
    if isinstance(value, CriticalityOptions):
        return asdict(value)
    raise InputError(f"{value!r} has no name that config.yaml could hold; register it (SELECTORS) and give its name")


def _changes(run: Mapping[str, Any], branch: Mapping[str, Any]) -> dict[str, Any]:
    """The sections in which a branch differs from its run."""
    return {key: value for key, value in branch.items() if value != run[key]}
