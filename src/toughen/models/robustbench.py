"""RobustBench's models by name: which of our architectures each entry is, and how it normalises its images.

The facts are those of github.com/RobustBench/robustbench at 78fcc9e (2025-03-31), ``robustbench/model_zoo``. Listed are
the entries for l_inf and l2 adversaries whose network is built in, or is torchvision's or timm's own. Not listed are
other networks, ensembles, and networks that normalise each image by itself. The weights are RobustBench's files.
"""

from typing import NamedTuple

from toughen.errors import InputError, unknown

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

RAW: Statistics = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # images go in as they are
HALF: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # to [-1, 1]
CIFAR10: Statistics = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR10_RONY: Statistics = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
CIFAR10_ENGSTROM: Statistics = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR10_AUGUSTIN: Statistics = (
    (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
)
CIFAR100: Statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CIFAR100_CHEN: Statistics = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CIFAR100_EXACT: Statistics = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


class Entry(NamedTuple):
    """One model of the benchmark.

    Attributes:
        dataset: What it was trained on: a key of ``CLASSES``.
        threat: ``"Linf"`` or ``"L2"``.
        name: Its key in the model zoo.
        spec: The architecture, as a spec of ``create``.
        width: Channels of the first stage, where they are not those of the spec.
        statistics: Mean and standard deviation of the images, as the network was trained with.
    """

    dataset: str
    threat: str
    name: str
    spec: str
    width: int | None
    statistics: Statistics

    @property
    def path(self) -> str:
        """The name with everything that tells it apart, as in ``cifar10/Linf/Wang2023Better_WRN-28-10``."""
        return f"{self.dataset}/{self.threat}/{self.name}"


def find(name: str, *, num_classes: int | None = None) -> Entry:
    """Return the entry of a name, which may begin with its data set, its threat or both.

    Args:
        name: ``Wang2023Better_WRN-28-10``, ``L2/Rice2020Overfitting`` or ``cifar10/L2/Rice2020Overfitting``.
        num_classes: Chooses between data sets that share a name but not the network.

    Raises:
        InputError: Not in the table, or a name of several networks.
    """
    *where, last = name.split("/")
    found = [e for e in TABLE if e.name == last and all(part in (e.dataset, e.threat) for part in where)]
    if not found:
        raise unknown(
            "RobustBench model",
            name,
            {entry.name for entry in TABLE} if len(where) == 0 else {entry.path for entry in TABLE},
            hint="listed by toughen list models 'robustbench/*'; for any other, write a function that builds it and"
            " give package.module:function",
        )
    if any(_network(entry) != _network(found[0]) for entry in found):
        found = [entry for entry in found if CLASSES[entry.dataset] == num_classes] or found
    if num_classes is not None and any(_network(entry) != _network(found[0]) for entry in found):
        paths = ", ".join(f"robustbench/{entry.path}" for entry in found)
        raise InputError(f"robustbench/{name} is the name of several networks; say which: {paths}")
    return found[0]


def _network(entry: Entry) -> tuple[str, int | None, Statistics]:
    return entry.spec, entry.width, entry.statistics


def _entries(dataset: str, threat: str, spec: str, statistics: Statistics, names: str) -> list[Entry]:
    network, _, width = spec.partition(" width ")
    return [Entry(dataset, threat, name, network, int(width) if width else None, statistics) for name in names.split()]


TABLE = (
    *_entries(
        "cifar10", "Linf", "wrn28_10", RAW,
        "Carmon2019Unlabeled Sehwag2020Hydra Sridhar2021Robust Standard Wang2020Improving Wu2020Adversarial_extra"
        " Zhang2020Geometry",
    ),
    *_entries("cifar10", "Linf", "wrn28_10", HALF, "Hendrycks2019Using"),
    *_entries(
        "cifar10", "Linf", "wrn34_10", RAW,
        "Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10 Chen2021LTD_WRN34_10 Chen2024Data_WRN_34_10"
        " Cui2020Learnable_34_10 Cui2023Decoupled_WRN-34-10 Huang2020Self Jia2022LAS-AT_34_10 Sehwag2021Proxy"
        " Sitawarin2020Improving Wu2020Adversarial Zhang2019Theoretically Zhang2019You Zhang2020Attacks",
    ),
    *_entries("cifar10", "Linf", "wrn34_10", CIFAR10, "Chen2020Efficient"),
    *_entries("cifar10", "Linf", "wrn34_10 width 240", RAW, "Sridhar2021Robust_34_15"),
    *_entries(
        "cifar10", "Linf", "wrn34_10 width 320", RAW,
        "Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20 Cui2020Learnable_34_20",
    ),
    *_entries("cifar10", "Linf", "wrn34_10 width 320", CIFAR10, "Rice2020Overfitting"),
    *_entries("cifar10", "Linf", "wrn70_16", RAW, "Jia2022LAS-AT_70_16"),
    *_entries(
        "cifar10", "Linf", "wrn28_10_silu", CIFAR10,
        "Cui2023Decoupled_WRN-28-10 Gowal2020Uncovering_28_10_extra Gowal2021Improving_28_10_ddpm_100m"
        " Pang2022Robustness_WRN28_10 Rade2021Helper_ddpm Rebuffi2021Fixing_28_10_cutmix_ddpm"
        " Wang2023Better_WRN-28-10 Xu2023Exploring_WRN-28-10",
    ),
    *_entries("cifar10", "Linf", "wrn34_10_silu", CIFAR10, "Rade2021Helper_extra"),
    *_entries("cifar10", "Linf", "wrn34_10_silu width 320", CIFAR10, "Gowal2020Uncovering_34_20"),
    *_entries(
        "cifar10", "Linf", "wrn70_16_silu", CIFAR10,
        "Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra Gowal2021Improving_70_16_ddpm_100m"
        " Pang2022Robustness_WRN70_16 Rebuffi2021Fixing_70_16_cutmix_ddpm Rebuffi2021Fixing_70_16_cutmix_extra"
        " Wang2023Better_WRN-70-16",
    ),
    *_entries("cifar10", "Linf", "rawrn70_16", CIFAR10, "Peng2023Robust"),
    *_entries(
        "cifar10", "Linf", "resnet18", RAW, "Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18 Sehwag2021Proxy_R18"
    ),
    *_entries("cifar10", "Linf", "resnet50", CIFAR10_ENGSTROM, "Engstrom2019Robustness"),
    *_entries("cifar10", "L2", "wrn28_10", RAW, "Standard"),
    *_entries("cifar10", "L2", "wrn28_10", CIFAR10_RONY, "Rony2019Decoupling"),
    *_entries("cifar10", "L2", "wrn34_10", RAW, "Sehwag2021Proxy Wu2020Adversarial"),
    *_entries(
        "cifar10", "L2", "wrn34_10", CIFAR10_AUGUSTIN,
        "Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra",
    ),
    *_entries(
        "cifar10", "L2", "wrn28_10_silu", CIFAR10, "Rebuffi2021Fixing_28_10_cutmix_ddpm Wang2023Better_WRN-28-10"
    ),
    *_entries(
        "cifar10", "L2", "wrn70_16_silu", CIFAR10,
        "Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm"
        " Rebuffi2021Fixing_70_16_cutmix_extra Wang2023Better_WRN-70-16",
    ),
    *_entries("cifar10", "L2", "resnet18", RAW, "Sehwag2021Proxy_R18"),
    *_entries("cifar10", "L2", "resnet50", CIFAR10_AUGUSTIN, "Augustin2020Adversarial"),
    *_entries("cifar10", "L2", "resnet50", CIFAR10_ENGSTROM, "Engstrom2019Robustness"),
    *_entries("cifar10", "L2", "preact_resnet18", CIFAR10, "Rice2020Overfitting"),
    *_entries("cifar100", "Linf", "wrn28_10", HALF, "Hendrycks2019Using"),
    *_entries(
        "cifar100", "Linf", "wrn34_10", RAW,
        "Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10 Chen2021LTD_WRN34_10 Chen2024Data_WRN_34_10"
        " Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 Cui2020Learnable_34_10_LBGAT9_eps_8_255"
        " Cui2023Decoupled_WRN-34-10 Cui2023Decoupled_WRN-34-10_autoaug Jia2022LAS-AT_34_10 Sehwag2021Proxy"
        " Sitawarin2020Improving",
    ),
    *_entries("cifar100", "Linf", "wrn34_10", CIFAR100_CHEN, "Chen2020Efficient"),
    *_entries("cifar100", "Linf", "wrn34_10", CIFAR100_EXACT, "Wu2020Adversarial"),
    *_entries("cifar100", "Linf", "wrn34_10 width 320", RAW, "Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20"),
    *_entries(
        "cifar100", "Linf", "wrn28_10_silu", CIFAR100,
        "Cui2023Decoupled_WRN-28-10 Pang2022Robustness_WRN28_10 Rebuffi2021Fixing_28_10_cutmix_ddpm"
        " Wang2023Better_WRN-28-10",
    ),
    *_entries(
        "cifar100", "Linf", "wrn70_16_silu", CIFAR100,
        "Gowal2020Uncovering Gowal2020Uncovering_extra Pang2022Robustness_WRN70_16"
        " Rebuffi2021Fixing_70_16_cutmix_ddpm Wang2023Better_WRN-70-16",
    ),
    *_entries("cifar100", "Linf", "resnet18", RAW, "Addepalli2022Efficient_RN18"),
    *_entries("cifar100", "Linf", "preact_resnet18", RAW, "Addepalli2021Towards_PARN18"),
    *_entries("cifar100", "Linf", "preact_resnet18", CIFAR100_EXACT, "Rice2020Overfitting"),
    *_entries(
        "imagenet", "Linf", "torchvision/resnet50", IMAGENET, "Engstrom2019Robustness Salman2020Do_R50 Wong2020Fast"
    ),
    *_entries("imagenet", "Linf", "torchvision/resnet18", IMAGENET, "Salman2020Do_R18"),
    *_entries("imagenet", "Linf", "torchvision/wide_resnet50_2", IMAGENET, "Salman2020Do_50_2"),
    *_entries("imagenet", "Linf", "torchvision/wide_resnet50_2", RAW, "Chen2024Data_WRN_50_2"),
    *_entries("imagenet", "Linf", "timm/convnext_base", IMAGENET, "Liu2023Comprehensive_ConvNeXt-B"),
    *_entries("imagenet", "Linf", "timm/convnext_large", IMAGENET, "Liu2023Comprehensive_ConvNeXt-L"),
    *_entries("imagenet", "Linf", "timm/vit_base_patch16_224", IMAGENET, "Mo2022When_ViT-B"),
)  # fmt: skip
