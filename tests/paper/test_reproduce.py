"""``toughen reproduce`` on a paper of a few rows, from nothing to filled tables."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from threading import Timer

import pytest
from small_paper import put_in_place, scale

from small_runs import fingerprints, log
from toughen.cli import main
from toughen.errors import InputError
from toughen.paper import Bench, Network, draw_figure, figures, fill, values
from toughen.paper.figures import Curve, Figure
from toughen.run_folder import RunFolder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of its tables; read only."""
    out = tmp_path_factory.mktemp("paper") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(patch)
        patch.setattr(figures, "FIGURES", {})
        for number in "123456":
            assert main(["reproduce", number, "--out", str(out)]) == 0
    return out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in_place(monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_a_file_of_a_table_says_where_it_was_measured(done: Path) -> None:
    content = json.loads((done / "tables" / "table-1.json").read_text())
    assert content["provenance"]["versions"]["torch"]
    assert "seed" not in content["provenance"]
    assert content["seeds"] == [0]
    assert content["differs"] == list(scale().differs)
    assert "Bai2024+CLAT mixes our own clean and robust networks, 0.8 of the robust one" in str(content["remarks"])


def table(folder: Path, number: int) -> list[dict[str, object]]:
    content = json.loads((folder / "tables" / f"table-{number}.json").read_text())
    assert content["scale"] == "digits"
    return content["rows"]


def test_accuracies_are_those_of_the_run_that_stands_behind_the_row(done: Path) -> None:
    pgd_at, clat, _ = table(done, 1)
    run = RunFolder.open(done / "digits-resnet18-pgd-at" / "seed-0")
    for row, name in ((pgd_at, "base"), (clat, "clat")):
        found = run.branch(name).evaluations("last")
        assert row["ours"] == {
            "clean": {"0": 100 * found["clean"]["accuracy"]},
            "pgd10": {"0": 100 * found["pgd-10"]["accuracy"]},
        }
        assert found["pgd-10"]["n"] == 20


def test_what_the_paper_prints_stands_beside_with_its_doubts(done: Path) -> None:
    text = (done / "tables" / "table-1.md").read_text()
    assert re.search(r"\| CIFAR-10 \| RN18 \| PGD-AT \| 80\.05 \| [\d.]+ \| 58\.15\* \| [\d.]+ \|", text)
    assert "* not what the table's title says: PGD-20 (CIFAR-10 RN18 PGD-AT)" in text
    assert re.search(r"\| PGD-AT\+CLAT \| 81\.03 \| [\d.]+ \| \? \|", text)
    assert "? doubtful in the paper: blurred (CIFAR-10 RN18 PGD-AT+CLAT)" in text
    assert "a test of the recipes, which says nothing about the methods" in text
    assert "clean, PGD-10 on 20 test images" in text


def test_a_mixture_is_measured_as_one_network(done: Path) -> None:
    [_, _, mixture] = table(done, 1)
    [accuracy] = mixture["ours"]["clean"].values()  # type: ignore[index]
    assert 0 <= accuracy <= 100
    [kept] = (done / "measured").glob("*clean-base+*clat")
    assert (kept / "seed-0" / "last" / "clean.json").is_file()


def test_autoattack_is_run_on_the_images_of_the_scale_with_its_queries(done: Path) -> None:
    [row] = table(done, 2)
    [kept] = (done / "measured").rglob("autoattack.json")
    found = json.loads(kept.read_text())
    assert row["ours"] == {"autoattack": {"0": 100 * found["accuracy"]}}
    assert found["n"] == row["n"]["autoattack"] == 8  # type: ignore[index]
    assert found["settings"]["square"]["queries"] == 5
    assert {found["settings"][name]["steps"] for name in ("apgd-ce", "apgd-t", "fab-t")} == {3}
    assert found["settings"]["fab-t"]["targets"] == 3
    assert found["settings"]["apgd-ce"]["threat"]["eps"] == 0.05


def test_black_box_images_are_made_on_pgd_at_and_shown_to_the_victim(done: Path) -> None:
    [row] = table(done, 3)
    for metric, name, n in (("blackbox_pgd", "pgd-10", 20), ("blackbox_autoattack", "autoattack", 8)):
        [file] = (done / "measured").rglob(f"{name}-elsewhere.json")
        assert file.parts[-4:-1] == ("digits-resnet18-pgd-at-base", "seed-0", "last")
        found = json.loads(file.read_text())
        victim = found["accuracy"]["digits-preact_resnet18-pgd-at-clat"]
        assert row["ours"][metric] == {"0": 100 * victim}  # type: ignore[index]
        assert row["n"][metric] == found["n"] == n  # type: ignore[index]


def test_layers_are_the_numbers_of_those_that_clat_found(done: Path) -> None:
    by_batch, _, first, later = (row["ours"] for row in table(done, 4))
    run = RunFolder.open(done / "digits-resnet18-pgd-at" / "seed-0")
    report = run.branch("clat").reports()[5]
    ranked = sorted((one for one in report["layers"] if not one["classifier"]), key=lambda one: -one["criticality"])
    assert first["critical_layers_top5"] == {"0": [one["index"] for one in ranked[:5]]}  # type: ignore[index]
    assert first["trainable_share"] == {"0": 100 * run.branch("clat").log()[-1]["trainable_share"]}  # type: ignore[index]
    late = RunFolder.open(done / "digits-resnet18-pgd-at-from-70" / "seed-0").branch("clat").reports()[8]
    [name] = late["selected"]
    assert later["critical_layers"] == {"0": [next(one["index"] for one in late["layers"] if one["name"] == name)]}  # type: ignore[index]
    assert len(by_batch["critical_layers_top5"]["0"]) == 5  # type: ignore[index]
    assert by_batch["time_s"]["0"] > 0  # type: ignore[index]


def test_a_difference_is_to_pgd_at_under_the_same_attack(done: Path) -> None:
    before, difference = (row["ours"] for row in table(done, 5))
    kept = {file.parts[-4]: json.loads(file.read_text()) for file in (done / "measured").rglob("pgd-50.json")}
    base = 100 * kept["digits-resnet18-pgd-at-base"]["accuracy"]
    assert before == {"adversarial": {"0": base}}
    assert difference == {"adversarial_delta": {"0": 100 * kept["digits-resnet18-pgd-at-clat"]["accuracy"] - base}}


def test_tables_share_their_runs(done: Path) -> None:
    assert sorted(path.name for path in done.iterdir() if path.name.startswith("digits")) == [
        "digits-preact_resnet18-pgd-at",
        "digits-resnet18-clean",
        "digits-resnet18-pgd-at",
        "digits-resnet18-pgd-at-from-70",
    ]


@pytest.mark.usefixtures("small")
def test_the_same_command_again_trains_and_attacks_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*.json*") if file.parts[-2] != "tables"}
    kept = {file: at for file, at in before.items() if file.name != "sweep.json"}
    assert main(["reproduce", "1", "2", "3", "4", "--out", str(done)]) == 0
    said = capsys.readouterr()
    assert "next" not in said.err
    assert "Table 1: about 1, --scale digits" in said.out
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.usefixtures("small")
def test_a_stop_keeps_what_is_done_and_the_same_command_goes_on(
    tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "6", "--out", "runs"]
    clock = Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    clock.start()
    assert main(words) == 130
    assert "Continue with the same command" in capsys.readouterr().err
    assert main(words) == 0
    one, other = (RunFolder(folder / "digits-resnet18-pgd-at" / "seed-0") for folder in (tmp_path / "runs", done))
    assert fingerprints(one.branch("base")) == fingerprints(other.branch("base"))
    assert log(one) == log(other)
    assert table(tmp_path / "runs", 6) == table(done, 6)


@pytest.mark.usefixtures("small")
def test_time_that_is_over_is_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "6", "--minutes", "0.01"]) == 130
    assert "What is done is kept" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_before_each_run_it_is_said_what_it_is_for_and_how_long_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "6"]) == 0
    assert "next, 1 of 1: digits-resnet18-pgd-at/seed-0, 10 epochs (for table-6)" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "1", "5", "--dry-run", "--seeds", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "paper-digits: 4 runs" in said
    assert "digits-resnet18-pgd-at │ 15 │ base, clat │ 0-1 │ table-1, table-5" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_seeds_are_told_as_mean_and_range(tmp_path: Path) -> None:
    assert main(["reproduce", "6", "--seeds", "2", "--out", "runs"]) == 0
    [values] = (row["ours"] for row in table(tmp_path / "runs", 6))
    low, high = sorted(values["clean"].values())  # type: ignore[index]
    text = (tmp_path / "runs" / "tables" / "table-6.md").read_text()
    assert f"| 57.01 | {(low + high) / 2:.2f} ({low:.2f} to {high:.2f}) |" in text
    assert "over 2 seeds, last checkpoint" in text


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9"], "the paper has no '9' to reproduce; name a table (1 to 6)"),
        (["1", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["1", "--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["1", "--data", "cifar10"], "--data cifar10 names no folder; write NAME:FOLDER, as in cifar10:data/cifar10"),
        (["1", "--clat", "k"], "'k' is not of the form key.path=value"),
        (["1", "--clat", "kk=3"], "'kk'; did you mean 'k'"),
        (["1", "--minutes", "1", "--dry-run"], "--dry-run trains nothing: give no --minutes with it"),
        (["1", "--sweep", "x.yaml", "--dry-run"], "--dry-run trains nothing: give no --sweep with it"),
        (["1", "--sweep", "x.yaml", "--workers", "2"], "--sweep trains nothing: give no --workers with it"),
        (["1", "--gpus", "1"], "--gpus is for runs on Ray; give --workers N too"),
        (["1", "--address", "auto", "--sweep", "x.yaml"], "--address is for runs on Ray; give --workers N too"),
        (["1", "--workers", "0"], "workers is 0"),
        (["1", "--weights", "x"], "--weights has no place at --scale digits, which trains all networks itself"),
        (["1", "--scale", "full", "--weights", "Engstrom2019"], "names no file; write NAME=FILE"),
        (["1", "--scale", "full", "--weights", "Engstrom2019=x.pt"], "did you mean 'Engstrom2019Robustness'"),
        (["1", "--scale", "full", "--weights", "Engstrom2019Robustness=x.pt"], "there is no file x.pt"),
        (["1", "--sweep", "x.json"], "its name must end in .yaml, .yml"),
        (["1", "--scale", "tiny"], "choose from 'full', 'short', 'digits'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("toughen: ")
    assert message in line


def test_runs_that_fail_for_one_reason_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "7", "--scale", "short", "--data", "cifar10:nowhere", "--out", "failed"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"toughen: \d+ runs failed: cifar10-\S+ and \d+ more: data folder nowhere does not exist", told)
    assert told.count("nowhere") == 1


@pytest.mark.usefixtures("small")
def test_runs_with_another_clat_do_not_mix_with_these(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "5", "--out", str(done), "--clat", "lam=0.5"]) == 2
    assert "was begun with other settings of branches.clat" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_rows_that_can_not_be_had_are_left_out_and_say_why(done: Path) -> None:
    bench = Bench(done, scale(), {}, {})
    rows = fill(5, bench, seeds=[0, 1])
    assert [len(row.ours[metric]) for row in rows for metric in row.ours] == [1, 1]
    assert all("seed-1/branches/" in row.missing and "is not trained" in row.missing for row in rows)


def test_a_curve_is_the_validation_of_a_run_and_of_what_it_began_from(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network("CIFAR-10", "RN18", going_on="clat")
    figure = Figure("one", "epochs", ("clean", "pgd10"), (Curve("CLAT", network),))
    monkeypatch.setitem(figures.FIGURES, 2, figure)  # type: ignore[index]
    file, missing = draw_figure(2, Bench(done, scale(), {}, {}), seeds=[0])
    assert missing == []
    assert file.read_bytes().startswith(b"\x89PNG")
    points = json.loads(file.with_suffix(".json").read_text())["points"]
    run = RunFolder.open(done / "digits-resnet18-pgd-at" / "seed-0")
    rows = [*run.log(), *run.branch("clat").log()]
    for metric, key in (("clean", "clean"), ("pgd10", "robust")):
        found = [(point["x"], point["mean"], point["n"]) for point in points[metric]["CLAT"]]
        assert found == [(10 * row["epoch"], 100 * row["validation"][key], 20) for row in rows]


def test_a_curve_over_eps_begins_with_clean_images_and_one_over_layers_with_none(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network("CIFAR-10", "RN18", going_on="clat")
    bench = Bench(done, scale(), {}, {})
    for kind, metric in (("strength", "pgd10"), ("layers", "clean")):
        figure = Figure("one", kind, (metric,), (Curve("CLAT", network, 1),))  # type: ignore[arg-type]
        monkeypatch.setitem(figures.FIGURES, 3, figure)  # type: ignore[index]
        file, missing = draw_figure(3, bench, seeds=[0])
        assert missing == []
        points = json.loads(file.with_suffix(".json").read_text())["points"][metric]["CLAT"]
        if kind == "layers":
            mean = bench.accuracy((network,), "clean", 0, samples=None)[0]
            assert points == [{"x": 1, "mean": mean, "low": mean, "high": mean, "n": 20, "seeds": [0]}]
        else:
            assert [point["x"] for point in points] == [0.05 * factor for factor in figures.STRENGTHS]
            assert points[0]["mean"] == bench.accuracy((network,), "clean", 0, samples=8)[0]
            assert points[-1]["mean"] <= points[0]["mean"]
            assert {point["n"] for point in points} == {8}


def test_what_is_not_trained_is_missing_in_a_figure(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure("one", "layers", ("clean",), (Curve("DN121", Network("CIFAR-10", "DN121"), 0),))
    monkeypatch.setitem(figures.FIGURES, 7, figure)  # type: ignore[index]
    _, [missing] = draw_figure(7, Bench(done, scale(), {}, {}), seeds=[0])
    assert re.match(r"DN121: .*digits-densenet121-pgd-at/seed-0/branches/base is not trained", missing)


def copied(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.usefixtures("small")
def test_a_victim_that_is_not_trained_takes_only_its_own_cells_away(done: Path, tmp_path: Path) -> None:
    out = copied(done, tmp_path)
    bench = Bench(out, scale(), {}, {})
    row = {"method": "PGD-AT", "model": "RN18", "attacker": "RN18", "values": {"blackbox_pgd": 70.12}}
    tables = values._tables()
    tables["3"]["rows"].append({"dataset": "CIFAR-10", **row})
    (out / "digits-preact_resnet18-pgd-at/seed-0/branches/clat/finished.json").unlink()
    away, there = fill(3, bench, seeds=[0])
    assert [len(found) for found in away.ours.values()] == [0, 0]
    assert away.missing.endswith("digits-preact_resnet18-pgd-at/seed-0/branches/clat is not trained")
    white = RunFolder.open(out / "digits-resnet18-pgd-at/seed-0").branch("base").evaluations("last")["pgd-10"]
    assert there.ours["blackbox_pgd"][0].value == 100 * white["accuracy"]


@pytest.mark.usefixtures("small")
def test_a_selection_is_measured_once_and_of_a_finished_run_alone(done: Path, tmp_path: Path) -> None:
    out = copied(done, tmp_path)
    before = fill(4, Bench(out, scale(), {}, {}), seeds=[0])[0].ours
    assert before == fill(4, Bench(out, scale(), {}, {}), seeds=[0])[0].ours  # its seconds too
    (out / "digits-resnet18-pgd-at/seed-0/branches/base/finished.json").unlink()
    [selection, *_] = fill(4, Bench(out, scale(), {}, {}), seeds=[0])
    assert selection.missing.endswith("digits-resnet18-pgd-at/seed-0/branches/base is not trained")


def test_a_run_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not trained"):
        Bench(tmp_path, scale(), {}, {}).run(Network("CIFAR-10", "RN18"), 0)


@pytest.mark.usefixtures("small")
def test_with_workers_the_same_runs_are_trained_on_ray(tmp_path: Path, done: Path) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "toughen[ray]"')
    assert main(["reproduce", "6", "--out", "runs", "--workers", "1"]) == 0
    assert table(tmp_path / "runs", 6) == table(done, 6)
