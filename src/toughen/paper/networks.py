"""The networks behind the paper's tables: what each is called there, and the recipe that trains it.

What the paper leaves open is settled here as the card of CLAT lists it (docs/methods/clat.md), in the literal form:
Eq. 6 with all batch norm in train mode, lambda from the ratio of the two losses since the paper gives none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from toughen.errors import InputError
from toughen.paper.scales import DATASETS, PAPER_EPOCHS, Scale
from toughen.paper.values import PaperRow

Method = dict[str, Any]

LAYERS = (1, 2, 3, 5, 8)  # that CLAT trains in Figures 3 and 7


@dataclass(frozen=True)
class Architecture:
    """A network of the paper: its name here, and how many layers CLAT trains of it (section 4.1).

    The paper gives no number for PreAct ResNet-18; it gets that of ResNet-18.
    """

    spec: str
    k: int


ARCHITECTURES = {
    "DN121": Architecture("densenet121", 5),
    "WRN70-16": Architecture("wrn70_16", 4),
    "RN50": Architecture("resnet50", 3),
    "WRN34-10": Architecture("wrn34_10", 2),
    "VGG19": Architecture("vgg19", 1),
    "RN18": Architecture("resnet18", 1),
    "PreAct-RN18": Architecture("preact_resnet18", 1),
}


@dataclass(frozen=True)
class Base:
    """What trains a network before CLAT: the X of "X + CLAT".

    Attributes:
        methods: From inner to outer.
        train: What else it sets of the training.
        spec: Its network, where that is not the architecture's own.
        augment: What varies its training images, where that is not crop and flip.
        published: The model of RobustBench whose weights take the place of its training, from a file that its user
            has downloaded.
        remark: In what it differs from the paper's, where it has no published weights.
    """

    methods: tuple[Method, ...] = ({"name": "pgd-at"},)
    train: Mapping[str, Any] = field(default_factory=dict)
    spec: str = ""
    augment: str = ""
    published: str = ""
    remark: str = ""


BASES: Mapping[str, Base] = {
    "pgd-at": Base(),
    "trades": Base(({"name": "trades", "beta": 6.0},)),
    "mart": Base(({"name": "mart", "beta": 5.0},)),
    "awp": Base(({"name": "pgd-at"}, {"name": "awp"})),
    "score": Base(({"name": "trades-lse"},)),
    "autolora": Base(
        ({"name": "autolora"},), remark="AutoLoRA starts from random weights, the paper's from ImageNet's"
    ),
    "twins": Base(
        ({"name": "pgd-at"}, {"name": "twins"}), remark="TWINS starts from random weights, the paper's from ImageNet's"
    ),
    "fast-at": Base(({"name": "fast-at"},), {"schedule": "cyclic", "peak": 0.4}),
    "clean": Base(({"name": "clean"},)),
    "idbh-weak": Base(augment="idbh_weak"),
    "idbh-strong": Base(augment="idbh_strong"),
    "peng2023": Base(spec="rawrn70_16", published="Peng2023Robust"),
    "gowal2021": Base(spec="wrn70_16_silu", published="Gowal2021Improving_70_16_ddpm_100m"),
    "engstrom2019": Base(published="Engstrom2019Robustness"),
    "chen2024": Base(published="Chen2024Data_WRN_34_10"),
    "wang2023": Base(spec="wrn70_16_silu", published="Wang2023Better_WRN-70-16"),
}
# label in a table: base, and how it goes on from half of the epochs
_LABELS: Mapping[str, tuple[str, str]] = {
    "PGD-AT": ("pgd-at", "base"),
    "PGD-AT+CLAT": ("pgd-at", "clat"),
    "PGD-AT+CLAT(non-dynamic)": ("pgd-at", "clat-fixed"),
    "PGD-AT+LoRA": ("pgd-at", "lora"),
    "PGD-AT+RiFT": ("pgd-at", "rift"),
    "CLAT critical layers": ("pgd-at", "clat"),
    "CLAT random layers": ("pgd-at", "clat-random"),
    "CLAT largest C": ("pgd-at", "clat"),
    "CLAT smallest C": ("pgd-at", "clat-bottom"),
    "CLAT dynamic layers": ("pgd-at", "clat"),
    "CLAT fixed layers": ("pgd-at", "clat-fixed"),
    "SWAAT": ("pgd-at", "swa"),
    "SWAAT+CLAT": ("pgd-at", "clat-swa"),
    "criticality selection": ("pgd-at", "base"),
    "clean pretraining+CLAT": ("clean", "clat"),
    "Fast-AT": ("fast-at", "base"),
    "Fast-AT+CLAT(Fast)": ("fast-at", "clat-fast"),
    "DataAug weak (Li & Spratling 2023)": ("idbh-weak", "base"),
    "DataAug weak+CLAT": ("idbh-weak", "clat"),
    "DataAug strong": ("idbh-strong", "base"),
    "DataAug strong+CLAT": ("idbh-strong", "clat"),
    **{
        label: (base, going_on)
        for name, base in {
            "TRADES": "trades",
            "MART": "mart",
            "AWP": "awp",
            "SCORE": "score",
            "AutoLoRA": "autolora",
            "TWINS": "twins",
            "Peng2023": "peng2023",
            "Wang2023": "wang2023",
            # the printed references belong to networks of RobustBench with exactly these figures (methods' authors)
            "(Carlini & Wagner 2017)": "gowal2021",
            "(Madry et al. 2019)": "engstrom2019",
            "(Croce & Hein 2020)": "chen2024",
        }.items()
        for label, going_on in ((name, "base"), (f"{name}+CLAT", "clat"), (f"{name}+RiFT", "rift"))
    },
}
PUBLISHED = tuple(base.published for base in BASES.values() if base.published)
_RIFT = 110  # epochs before the ten of RiFT (appendix D.9)
MIXED = 0.8  # the weight of the robust network in a mixture, with which docs/results.md measured it
_MIXTURES = {"Bai2024": "base", "Bai2024+CLAT": "clat"}


@dataclass(frozen=True)
class Network:
    """One trained network.

    Attributes:
        dataset: As the paper calls it.
        model: As the paper calls it.
        base: A key of ``BASES``.
        going_on: How it goes on from there: a key of ``_continuations``.
        start: Epochs of the base, at the paper's length; where ten more exceed its 100, the run is so much longer.
    """

    dataset: str
    model: str
    base: str = "pgd-at"
    going_on: str = "base"
    start: int = 50

    def run_name(self, scale: Scale) -> str:
        """The name of the run that it is of, the same for all that share a base."""
        parts = [scale.data_of(self.dataset)["name"], ARCHITECTURES[self.model].spec, self.base]
        if self.from_published(scale):
            parts.append(self.going_on)
        elif self.start != Network.start:
            parts.append(f"from-{self.start}")
        return "-".join(parts)

    def branch(self, scale: Scale) -> str | None:
        """The branch of that run; None where the run is the network itself."""
        return None if self._alone(scale) else self.going_on

    def published(self, scale: Scale) -> bool:
        """Whether published weights are this network, and nothing is trained."""
        return self.from_published(scale) and self.going_on == "base"

    def from_published(self, scale: Scale) -> bool:
        """Whether it is published weights, or goes on from them."""
        return bool(BASES[self.base].published) and scale.published

    def document(
        self, scale: Scale, *, clat: Mapping[str, Any], weights: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the recipe of its run, with this network as the only branch.

        Args:
            scale: How large.
            clat: Settings of CLAT that replace the literal ones.
            weights: Files of published weights, by their name at RobustBench.

        Raises:
            InputError: It begins from published weights, which are not there.
        """
        base, architecture = BASES[self.base], ARCHITECTURES[self.model]
        goes_on = _continuations(base.methods, architecture.k, scale, clat)
        if self.going_on not in goes_on:
            raise InputError(f"no network of the paper goes on by {self.going_on!r}; these are {', '.join(goes_on)}")
        sections: dict[str, Any] = {
            "description": f"{self.model} on {self.dataset}: {self.base}, with what goes on from it",
            "model": scale.model_of(base.spec or architecture.spec),
            "data": scale.data_of(self.dataset, augment=base.augment),
            "threat": dict(scale.threat),
            "attack": dict(scale.attack),
            "method": [*base.methods],
            "train": {**scale.train, **base.train, "epochs": scale.epochs(max(PAPER_EPOCHS, self.start + 10))},
            "evaluate": {"attacks": ["clean", "pgd-10"]},
        }
        if self.from_published(scale):
            sections["model"] = _published(self.dataset, base.published, weights or {})
            # the rate that a cosine from 0.1 has half-way, falling along a cosine of its own
            epochs, lr = scale.epochs(PAPER_EPOCHS - Network.start), sections["train"]["lr"] / 2
            sections["train"] |= {"epochs": epochs, "lr": lr}
            return sections if self.going_on == "base" else {**sections, "method": goes_on[self.going_on]}
        if self._alone(scale):
            return {**sections, "method": goes_on[self.going_on]}
        changes = {"train": {"lr": sections["train"]["lr"] / 10}} if self.going_on == "base-slow" else {}
        branch = {"method": goes_on[self.going_on], **changes} if self.going_on != "base" else {}
        return {**sections, "branch_epoch": scale.epochs(self.start), "branches": {self.going_on: branch}}

    def _alone(self, scale: Scale) -> bool:
        return self.start == 0 or self.from_published(scale)


def networks(row: PaperRow) -> tuple[Network, ...]:
    """Return the networks behind a row: one, or the accurate and the robust one of a mixture (Bai et al. 2024)."""
    if row.method in _MIXTURES:
        accurate = Network(row.dataset, row.model, "clean")
        return accurate, Network(row.dataset, row.model, going_on=_MIXTURES[row.method])
    base, going_on = _LABELS[row.method]
    start = _RIFT if going_on == "rift" else Network.start
    if row.epoch:  # Table 13 begins its selections there
        start = 70
    return (Network(row.dataset, row.model, base, going_on, start),)


def remarks(row: PaperRow, scale: Scale) -> list[str]:
    """Say in what the networks behind a row differ from the paper's, beside what the scale says."""
    found = []
    if row.method in _MIXTURES:
        share = f"{MIXED:g} of the robust one"
        found.append(f"{row.method} mixes our own clean and robust networks, {share}; its authors' are others")
    for network in networks(row):
        base = BASES[network.base]
        if base.remark:
            found.append(base.remark)
        if network.from_published(scale) and network.going_on == "base":
            found.append(f"{row.method} is {base.published} of RobustBench")
        elif network.from_published(scale):
            left = scale.epochs(PAPER_EPOCHS - Network.start)
            found.append(f"{row.method} goes on from {base.published} for {left} epochs, from half the rate to 0")
        if network.going_on == "rift":
            epochs = scale.epochs(_RIFT), scale.epochs(_RIFT + 10)
            found.append(f"RiFT from epoch {epochs[0]} to {epochs[1]}, as its authors and appendix D.9 have it")
    if scale.data is None and "image_size" in DATASETS[row.dataset]:
        found.append(f"{row.dataset} at {DATASETS[row.dataset]['image_size']} pixels, which the paper does not say")
    return found


def attacking(row: PaperRow) -> Network:
    """Return the network that the images of a black-box row were made on: PGD-AT's, also where CLAT is the victim."""
    return Network(row.dataset, row.attacker)


def with_layers(network: Network, k: int) -> Network:
    """Return the network of which CLAT trains ``k`` layers (Figures 3 and 7)."""
    return replace(network, going_on="clat" if k == ARCHITECTURES[network.model].k else f"clat-k{k}")


def merged(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join recipes that differ in their branches alone."""
    first, *others = documents
    whole = dict(first)
    for other in others:
        if "branches" in whole:
            whole["branches"] = {**whole["branches"], **other["branches"]}
    return whole


def _published(dataset: str, name: str, weights: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a network with the weights that RobustBench offers."""
    if dataset != "CIFAR-10":
        raise InputError(f"{name} has no published weights for {dataset}")
    if name not in weights:
        raise InputError(f"RobustBench offers {name} for download by hand; give it with --weights {name}=FILE")
    return {"name": f"robustbench/cifar10/Linf/{name}", "weights": weights[name]}


def _continuations(
    methods: tuple[Method, ...], k: int, scale: Scale, clat: Mapping[str, Any]
) -> dict[str, list[Method]]:
    """How a run can go on from the end of its base, by name of the branch."""
    every = scale.epochs(10)

    def critical(**settings: Any) -> Method:
        return {"name": "clat-paper", "k": k, "lam": "auto", "every": every, **clat, **settings}

    objective, *wrappers = methods
    swa = {"name": "swa", "start_epoch": scale.epochs(Network.start)}
    around = wrappers if critical().get("base", "clean_ce") != "inner" else []
    within = [] if around else wrappers

    def with_clat(**settings: Any) -> list[Method]:
        # CLAT's loss replaces the objective's, so what shapes the step has to stand around it
        return [objective, *within, critical(**settings), *around]

    return {
        "base": [*methods],
        "base-slow": [*methods],
        "clat": with_clat(),
        "clat-slow": with_clat(lr_scale=0.1),
        "clat-fixed": with_clat(every=None),
        "clat-random": with_clat(select="random"),
        "clat-bottom": with_clat(select="bottom"),
        "clat-fast": with_clat(inner_max="fgsm-rs"),
        **{f"clat-k{number}": with_clat(k=number) for number in LAYERS},
        "lora": [*methods, {"name": "lora"}],
        "rift": [*methods, {"name": "rift", "lr": "restart", "lr_scale": 0.01}],  # from 0.001, as its authors do
        "swa": [*methods, swa],
        "clat-swa": [*with_clat(), swa],
    }
