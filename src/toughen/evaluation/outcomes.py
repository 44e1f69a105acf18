"""What an evaluation finds: the outcome of every sample, what each stage of an attack cost, and their form as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Flag:
    """Something that was seen and that may make measured robustness an artefact.

    Attributes:
        check: Short name of the check, for example ``"randomised-forward"``.
        seen: What was seen, with numbers.
        advice: What to do about it, one clause.
    """

    check: str
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.check}: {self.seen}; {self.advice}"

    def to_dict(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """One attack of a sequence, or the only one.

    Attributes:
        name: Of the stage; the attack's own name where it is the only one.
        attacked: Samples that it was run on.
        fell: Samples that it broke.
        forwards: Images that the model was shown.
        backwards: Images for which a gradient was computed.
        seconds: Wall time, over all processes; the only value here that differs between two equal evaluations.
    """

    name: str
    attacked: int = 0
    fell: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one attack, or of a suite such as ``standard``, for every sample.

    Attributes:
        attack: Its name.
        settings: Norm, eps, steps and so on, as plain values; of each stage where there are several; empty for clean
            images.
        seed: Of all randomness.
        batch_size: Samples attacked at once, which is part of what the random numbers depend on.
        attack_all: Whether samples that the model gets wrong were attacked as well.
        index: Place of each sample in its data set.
        label: Its class.
        correct: Whether the model was right on the clean image and on every perturbed one.
        loss: Cross-entropy where the sample fell, or at the worst point that was seen.
        distance: Of that point from the image, in the norm of the attack (l_inf for one without a norm).
        fell: The stage that broke the sample; ``"clean"`` where the model was wrong already; None where it stands.
        stages: What was run, in its order.
        remarks: How the attack departs from its published form on this model, for example with few classes.
        versions: Of the packages whose arithmetic matters.
        device: On which kind of device, for example ``"cpu"``; random numbers differ between kinds.
        flags: What was seen that may make robustness an artefact.
        facts: What the caller knows, for example the checksums of weights and images.
        complete: False in a file of which the rest is still to come.
    """

    attack: str
    settings: dict[str, Any]
    seed: int
    batch_size: int
    attack_all: bool
    index: tuple[int, ...]
    label: tuple[int, ...]
    correct: tuple[bool, ...]
    loss: tuple[float, ...]
    distance: tuple[float, ...]
    fell: tuple[str | None, ...]
    stages: tuple[Stage, ...] = ()
    remarks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    flags: tuple[Flag, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of samples that stand, in [0, 1]."""
        return sum(self.correct) / len(self.correct)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def per_class(self) -> dict[int, tuple[float, int]]:
        """Return the accuracy and the number of samples of each class that occurs."""
        classes: dict[int, list[bool]] = {}
        for label, right in zip(self.label, self.correct, strict=True):
            classes.setdefault(label, []).append(right)
        return {label: (sum(found) / len(found), len(found)) for label, found in sorted(classes.items())}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: totals first, then one entry per sample (``correct``: 1 stands, 0 falls)."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "n": self.n,
            "complete": self.complete,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "attack_all": self.attack_all,
            "settings": self.settings,
            "versions": dict(self.versions),
            "device": self.device,
            **self.facts,
            "facts": list(self.facts),
            "remarks": list(self.remarks),
            "flags": [flag.to_dict() for flag in self.flags],
            "stages": [asdict(stage) for stage in self.stages],
            "index": list(self.index),
            "label": list(self.label),
            "correct": [int(right) for right in self.correct],
            "loss": list(self.loss),
            "distance": list(self.distance),
            "fell": list(self.fell),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EvalResult":
        """Read what ``to_dict`` wrote.

        Raises:
            KeyError: An entry is missing.
        """
        plain = ("attack", "settings", "seed", "batch_size", "attack_all", "versions", "device", "complete")
        columns = ("index", "label", "loss", "distance", "fell", "remarks")
        values: dict[str, Any] = {name: content[name] for name in plain}
        values |= {name: tuple(content[name]) for name in columns}
        return cls(
            **values,
            correct=tuple(bool(right) for right in content["correct"]),
            stages=tuple(Stage(**stage) for stage in content["stages"]),
            flags=tuple(Flag(**flag) for flag in content["flags"]),
            facts={name: content[name] for name in content["facts"]},
        )
