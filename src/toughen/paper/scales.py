"""How large a table is reproduced: as in the paper, shortened, or small enough for a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PAPER_EPOCHS = 100
# pictures of ImageNet are brought to 64x64, the size at which networks with a stem for CIFAR can be trained at all
DATASETS: Mapping[str, Mapping[str, Any]] = {
    "CIFAR-10": {"name": "cifar10"},
    "CIFAR-100": {"name": "cifar100"},
    "Imagenette": {"name": "imagenette160", "image_size": 64},
    "ImageNet": {"name": "imagenet", "image_size": 64},
}
_PAPER_ATTACK = {"name": "pgd", "step_size": 0.007, "steps": 10}
_PAPER_TRAIN = {"batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What stands for the paper's 100 epochs, its data and its networks.

    Attributes:
        name: Of the scale.
        num_epochs: In place of 100.
        seeds: Runs of each network; the paper has at least 10.
        samples: Test images for AutoAttack and its like; None is all.
        published: Whether networks with published weights begin with these; else with the base's own training.
        differs: In what this is not as in the paper, for the reader of a table.
        data: Replaces the data of the paper; None keeps it.
        colours: What else ``data`` needs for augmentations of colour pictures.
        widths: Channels of the first stage, by network.
        steps: Of the searches within AutoAttack.
        queries: Of Square within AutoAttack.
    """

    name: str
    num_epochs: int
    seeds: int
    samples: int | None
    published: bool
    differs: tuple[str, ...]
    data: Mapping[str, Any] | None = None
    colours: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    steps: int = 100
    queries: int = 5000
    threat: Mapping[str, Any] = field(default_factory=lambda: {"norm": "linf", "eps": 0.03})
    attack: Mapping[str, Any] = field(default_factory=lambda: _PAPER_ATTACK)
    batch_size: int = 128

    def epochs(self, of_the_paper: int) -> int:
        """Return the epochs that stand for so many of the paper's, at least 1 where there are any."""
        return max(round(of_the_paper * self.num_epochs / PAPER_EPOCHS), min(of_the_paper, 1))

    @property
    def train(self) -> dict[str, Any]:
        """The settings of training."""
        return {
            **_PAPER_TRAIN,
            "epochs": self.num_epochs,
            "batch_size": self.batch_size,
            "validate_every": self.epochs(5),
        }

    def data_of(self, dataset: str, *, augment: str = "") -> dict[str, Any]:
        """Return the settings of the images that stand for a data set of the paper, and of what varies them."""
        if self.data is None:
            return {**DATASETS[dataset], "augment": [augment or "crop_flip"]}
        return {**self.data, **({**self.colours, "augment": [augment]} if augment else {})}

    def model_of(self, spec: str) -> dict[str, Any]:
        """Return the settings of a network."""
        return {"name": spec, **({"width": self.widths[spec]} if spec in self.widths else {})}


_LOWEST = "the mean of the runs, where the paper prints the lowest of at least 10"
_HELD_OUT = "1,000 training images are held out for validation, of which the paper says nothing"
_NARROW = ("densenet121", "wrn70_16", "wrn70_16_silu", "rawrn70_16", "resnet50", "wrn34_10")
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="full",
            num_epochs=PAPER_EPOCHS,
            seeds=10,
            samples=None,
            published=True,
            differs=(_LOWEST, _HELD_OUT),
        ),
        Scale(
            name="short",
            num_epochs=30,
            seeds=3,
            samples=1000,
            published=True,
            differs=(
                "30 epochs in place of 100, of which every 3 stand for 10",
                _LOWEST,
                _HELD_OUT,
                "AutoAttack and the attacks of Table 17 on the first 1,000 test images",
            ),
        ),
        Scale(
            name="digits",
            num_epochs=10,
            seeds=1,
            samples=16,
            published=False,
            differs=(
                "scikit-learn's digits, 8x8, in place of all data sets: 200 training and 100 test images, eps 0.05",
                "narrow networks, 10 epochs in place of 100, of which every one stands for 10",
                "PGD-AT in place of published weights and of pretraining on ImageNet",
                "AutoAttack with 20 steps and 100 queries, on 16 images, as are the attacks of Table 17",
                "a test of the recipes, which says nothing about the methods",
            ),
            data={
                "name": "digits",
                "validation": 100,
                "train_samples": 200,
                "test_samples": 100,
                "augment": [{"name": "crop", "pad": 1}],
            },
            # what IDBH asks for
            colours={"image_size": 12, "channels": 3},
            widths={**dict.fromkeys(_NARROW, 4), "vgg19": 8, "resnet18": 8, "preact_resnet18": 8},
            steps=20,
            queries=100,
            threat={"norm": "linf", "eps": 0.05},
            attack={"name": "pgd", "step_size": 0.0125, "steps": 10},
            batch_size=50,
        ),
    )
}
