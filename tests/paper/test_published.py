"""Rows that begin with published weights, on a small network in RobustBench's place and a file of its weights."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_paper import put_in_place, scale

from toughen import data as datasets
from toughen import models
from toughen.cli import main
from toughen.config import resolve
from toughen.evaluation import evaluate, parse_attack
from toughen.models import robustbench
from toughen.models.weight_files import read_weights
from toughen.paper import Bench, Network, Scale, fill
from toughen.run_folder import RunFolder

NAME = "Engstrom2019Robustness"
ROWS = {
    "1": [
        {"method": "(Madry et al. 2019)", "values": {"clean": 87.03, "pgd10": 53.29}},
        {"method": "(Madry et al. 2019)+CLAT", "values": {"clean": 88.01}},
    ]
}
PUBLISHED = Network("CIFAR-10", "RN18", "engstrom2019")


def colourful() -> Scale:
    """The small scale with pictures in colour, and published weights as in the large ones."""
    small = scale()
    return replace(small, published=True, data={**(small.data or {}), **small.colours})


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of weights as RobustBench offers them, of a network that is not as it is drawn."""
    entry = robustbench.Entry("cifar10", "Linf", NAME, "resnet18", 2, robustbench.HALF)
    monkeypatch.setattr(robustbench, "TABLE", (entry,))
    put_in_place(monkeypatch, ROWS, colourful())
    monkeypatch.chdir(tmp_path)
    model = models.create(f"robustbench/{NAME}", seed=7)
    torch.save({"state_dict": model.state_dict(), "epoch": 100}, tmp_path / "engstrom.pt")
    return tmp_path / "engstrom.pt"


def by_hand(file: Path, attack: str) -> float:
    """The accuracy of the network in the file, without the paper's tables in between."""
    recipe = resolve(PUBLISHED.document(colourful(), clat={}, weights={NAME: str(file)}))
    test = datasets.load(recipe.data).test
    attacks = [parse_attack(attack, threat=recipe.threat, step_size=recipe.test_step_size)]
    batches = datasets.in_order(test, batch_size=recipe.test_batch_size, device="cpu")
    found = evaluate(models.create(f"robustbench/{NAME}", weights=file), batches, attacks, seed=0)
    return 100 * found[attack].accuracy


@pytest.mark.parametrize("attack", ["clean", "pgd-10"])
def test_a_published_network_is_measured_from_its_file(file: Path, tmp_path: Path, attack: str) -> None:
    bench = Bench(tmp_path / "runs", colourful(), {}, {}, weights={NAME: str(file)})
    value, n = bench.accuracy((PUBLISHED,), attack, 0, samples=None)
    assert n == 20
    assert value == by_hand(file, attack)


def test_the_tables_rows_are_filled_from_the_file_and_from_a_run_that_begins_there(file: Path) -> None:
    assert main(["reproduce", "1", "--out", "runs", "--weights", f"{NAME}={file.name}"]) == 0
    published, with_clat = (row["ours"] for row in rows())
    assert published == {"clean": {"0": by_hand(file, "clean")}, "pgd10": {"0": by_hand(file, "pgd-10")}}
    [run] = [RunFolder.open(found.parent) for found in Path("runs").rglob("config.yaml")]
    assert with_clat == {"clean": {"0": 100 * run.evaluations("last")["clean"]["accuracy"]}}
    assert run.config()["model"]["weights"] == str(file)
    first, trained = weights_of(run.checkpoints), read_weights(file)
    # CLAT trains one layer: all others are as published
    assert sum(not torch.equal(first[name], trained[f"state_dict/{name}"]) for name in convolutions(first)) == 1


def test_a_published_network_is_one_value_whatever_the_number_of_seeds(file: Path, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "runs", colourful(), {}, {}, weights={NAME: str(file)})
    [published, with_clat] = fill(1, bench, seeds=range(3))
    assert [len(found) for found in published.ours.values()] == [1, 1]
    assert published.missing == ""
    assert "seed-0 is not trained" in with_clat.missing
    kept = sorted(path.relative_to(bench.out / "measured") for path in bench.out.rglob("*.json"))
    place = Path("digits-resnet18-engstrom2019-base") / "seed-0" / "last"
    assert kept == [place / "clean.json", place / "pgd-10.json"]


def test_without_the_file_its_rows_are_left_out_and_say_what_to_give(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert file.is_file()
    assert main(["reproduce", "1", "--out", "runs"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"RobustBench offers {NAME} for download by hand; give it with --weights {NAME}=FILE" in said
    assert [row["ours"] for row in rows()] == [{"clean": {}, "pgd10": {}}, {"clean": {}}]


def rows() -> list[dict[str, object]]:
    return json.loads(Path("runs/tables/table-1.json").read_text())["rows"]


def weights_of(checkpoints: Path) -> Mapping[str, torch.Tensor]:
    return read_weights(checkpoints / "last" / "weights.safetensors")


def convolutions(weights: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, value in weights.items() if value.dim() == 4]
