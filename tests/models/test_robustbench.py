import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.models import MODELS, check_spec, create, robustbench
from toughen.models.robustbench import CLASSES, RAW, TABLE, find

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small(entry: robustbench.Entry, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the entry into the table with the small network for its own, and return its spec."""
    monkeypatch.setattr(robustbench, "TABLE", (entry._replace(name="Small2025", spec="small_cnn", width=2),))
    return "robustbench/Small2025"


def theirs(statistics: robustbench.Statistics, **settings: Any) -> nn.Module:
    return create("small_cnn", width=2, seed=1, mean=statistics[0], std=statistics[1], **settings).eval()


def state(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in model.state_dict().items() if not name.startswith("normalize.")}


@pytest.mark.parametrize(
    "name",
    [
        "cifar10/Linf/Wang2023Better_WRN-28-10",  # normalises, and its file does not say so
        "cifar10/Linf/Carmon2019Unlabeled",  # takes images as they are
        "cifar100/Linf/Hendrycks2019Using",  # takes images in [-1, 1]
        "cifar10/L2/Augustin2020Adversarial",
    ],
)
@pytest.mark.parametrize("form", ["plain", "module.", "model.", "with mu and sigma"])
def test_the_file_gives_the_logits_of_its_network_with_its_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    entry = find(name)
    network = theirs(entry.statistics)
    tensors = state(network, form if form.endswith(".") else "")
    if form == "with mu and sigma":
        mu, sigma = (torch.tensor(values).view(1, 3, 1, 1) for values in entry.statistics)
        tensors |= {"mu": mu, "sigma": sigma}
    torch.save({"state_dict": tensors} if form == "module." else tensors, tmp_path / "weights.pt")

    spec = small(entry, monkeypatch)
    model = create(spec, weights=tmp_path / "weights.pt", data_statistics=((0.1,) * 3, (0.2,) * 3)).eval()

    assert torch.equal(model(X), network(X))


def test_statistics_of_the_file_win_over_the_tables_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = theirs(((0.5,) * 3, (0.25,) * 3))
    torch.save({**state(network, ""), "mu": torch.full((3,), 0.5), "sigma": torch.full((3,), 0.25)}, tmp_path / "a.pt")
    spec = small(find("cifar10/Linf/Carmon2019Unlabeled"), monkeypatch)
    with pytest.warns(UserWarning, match="holds its own normalisation"):
        model = create(spec, weights=tmp_path / "a.pt").eval()
    assert torch.equal(model(X), network(X))


def test_every_entry_is_a_network_that_there_is() -> None:
    for entry in TABLE:
        check_spec(f"robustbench/{entry.path}")
        check_spec(entry.spec)
        assert entry.width is None or entry.spec in MODELS
        assert entry.dataset in CLASSES
        assert entry.threat in ("Linf", "L2")
        assert [len(values) for values in entry.statistics] == [3, 3]
    assert len({entry.path for entry in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    ("name", "spec", "width", "mean", "std"),
    [
        ("Wang2023Better_WRN-28-10", "wrn28_10_silu", None, 0.4914, 0.2471),
        ("cifar100/Linf/Wang2023Better_WRN-70-16", "wrn70_16_silu", None, 0.5071, 0.2673),
        ("Zhang2019Theoretically", "wrn34_10", None, 0.0, 1.0),
        ("Peng2023Robust", "rawrn70_16", None, 0.4914, 0.2471),
        ("Linf/Rice2020Overfitting", "wrn34_10", 320, 0.4914, 0.2471),
        ("L2/Rice2020Overfitting", "preact_resnet18", None, 0.4914, 0.2471),
        ("L2/Engstrom2019Robustness", "resnet50", None, 0.4914, 0.2023),
        ("Salman2020Do_R18", "torchvision/resnet18", None, 0.485, 0.229),
    ],
)
def test_entries_have_the_networks_of_the_papers(
    name: str, spec: str, width: int | None, mean: float, std: float
) -> None:
    entry = find(name, num_classes=10)
    assert (entry.spec, entry.width) == (spec, width)
    assert (entry.statistics[0][0], entry.statistics[1][0]) == (mean, std)


def test_the_number_of_classes_tells_data_sets_apart_that_share_a_name() -> None:
    assert find("Wu2020Adversarial", num_classes=10).statistics == RAW
    assert find("Wu2020Adversarial", num_classes=100).statistics != RAW


def test_a_name_of_several_networks_is_refused_with_their_full_names() -> None:
    with pytest.raises(InputError, match=r"cifar10/Linf/Rice2020Overfitting, robustbench/cifar10/L2/Rice2020Overfitt"):
        find("Rice2020Overfitting", num_classes=10)
    with pytest.raises(InputError, match=r"say which: .*cifar10/Linf/Wu2020Adversarial.*cifar100/Linf/Wu2020Adversar"):
        find("Wu2020Adversarial", num_classes=7)


def test_a_model_that_is_not_in_the_table_is_refused_with_the_nearest_and_a_way_out() -> None:
    with pytest.raises(InputError, match=r"did you mean 'Wang2023Better_WRN-28-10'.*package\.module:function"):
        check_spec("robustbench/Wang2023Better_WRN-28-1")
    with pytest.raises(InputError, match="unknown RobustBench model 'cifar10/L2/Peng2023Robust'"):
        check_spec("robustbench/cifar10/L2/Peng2023Robust")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": True}, "cannot be had pretrained, since RobustBench offers its files for download by hand"),
        ({"width": 4}, "width is 4, and robustbench/Peng2023Robust has its own"),
    ],
)
def test_what_an_entry_decides_itself_cannot_be_set(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        create("robustbench/Peng2023Robust", **settings)
