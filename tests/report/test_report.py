import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from toughen.errors import InputError
from toughen.report import comparison_table, plot_criticality, plot_report, plot_training
from toughen.run_folder import RunFolder

SETTINGS = {"threat": {"norm": "linf", "eps": 0.1}, "steps": 20}


def result(accuracy: float, *, n: int = 1000, settings: Any = None, images: str = "digits") -> dict[str, Any]:
    facts = {"accuracy": accuracy, "n": n, "settings": settings or {}, "seed": 0, "correct": []}
    return {**facts, "epoch": 3, "images_sha256": images}


def row(epoch: int, **changes: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "method": "PGD-AT",
        "seconds": 2.0,
        "trainable_share": 1.0,
        "gflops_per_image": 3.0,
        "pgd_at_gflops_per_image": 3.0,
        "validation": {"clean": 0.1 * epoch, "robust": 0.05 * epoch, "n": 20},
        **changes,
    }


def make(path: Path, *, data: str = "digits", branches: tuple[str, ...] = (), **accuracies: float) -> RunFolder:
    """A run folder written by hand; no training, no torch."""
    config = {"data": {"name": data}, "threat": {"norm": "linf", "eps": 0.1}, "branches": dict.fromkeys(branches)}
    run = RunFolder.create(path, config, {})
    run.write_log([row(1, seconds=9.0), row(2), row(3)])
    figures = {"clean": 0.812, "clean_best": 0.823, "pgd": 0.434, "pgd_best": 0.445, **accuracies}
    for checkpoint, suffix in (("last", ""), ("best", "_best")):
        clean, pgd = figures[f"clean{suffix}"], figures[f"pgd{suffix}"]
        run.write_evaluation(checkpoint, "clean", result(clean, images=data))
        run.write_evaluation(checkpoint, "pgd-20", result(pgd, settings=SETTINGS, images=data))
    return run


def shown(*runs: RunFolder) -> str:
    text = StringIO()
    Console(file=text, width=200).print(comparison_table(runs))
    return text.getvalue()


def cells(*runs: RunFolder) -> dict[str, list[str]]:
    table = comparison_table(runs)
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def report(selected: str) -> dict[str, Any]:
    layers = [
        {"index": index, "name": name, "criticality": value, "shape_ratio": None, "classifier": name == "fc"}
        for index, (name, value) in enumerate((("a", 0.5), ("b", None), ("fc", 9.0)))
    ]
    return {"selected": [selected], "layers": layers}


def test_the_table_holds_the_numbers_of_the_files(tmp_path):
    found = cells(make(tmp_path / "run"))
    assert found == {"run": ["PGD-AT", "3", "81.2 (82.3)", "43.4 (44.5)", "100.0 %", "2.00", "1.00"]}


def test_costs_are_the_median_time_and_the_mean_operations_relative_to_pgd_at(tmp_path):
    run = make(tmp_path / "run")
    run.write_log(
        [
            row(1, gflops_per_image=3.0),
            row(2, gflops_per_image=1.5, seconds=4.0),
            row(3, gflops_per_image=0.0, seconds=100.0, trainable_share=0.125),
        ]
    )
    assert cells(run)["run"][-3:] == ["12.5 %", "4.00", "0.50"]


def test_branches_follow_their_run_in_the_order_of_the_recipe(tmp_path):
    run = make(tmp_path / "run", branches=("pgd-at", "clat"))
    make(run.branch("clat").path, pgd=0.5)
    make(run.branch("pgd-at").path, pgd=0.4)
    found = cells(run)
    assert list(found) == ["run", "run/pgd-at", "run/clat"]
    assert [row[3].split()[0] for row in found.values()] == ["43.4", "40.0", "50.0"]


def test_the_table_says_how_many_images_the_threat_model_and_the_standard_error(tmp_path):
    text = " ".join(shown(make(tmp_path / "run")).split())
    assert "1000 test images" in text
    assert "linf, eps 0.1" in text
    assert "up to 1.6 points" in text  # 50 / sqrt(1000)


@pytest.mark.parametrize(
    "unlike",
    [
        result(0.3, settings={**SETTINGS, "steps": 10}),
        result(0.3, settings={**SETTINGS, "threat": {"norm": "linf", "eps": 0.2}}),
    ],
    ids=["steps", "eps"],
)
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_runs_that_were_not_evaluated_alike_are_refused(tmp_path, unlike, checkpoint):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    second.write_evaluation(checkpoint, "pgd-20", unlike)
    with pytest.raises(InputError, match=r"second.*not evaluated alike \(pgd-20"):
        comparison_table([first, second])


def test_runs_on_different_data_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"second and first were evaluated on different test images .*cifar10"):
        comparison_table([make(tmp_path / "first"), make(tmp_path / "second", data="cifar10")])


def test_runs_for_different_threat_models_are_refused_even_if_only_clean_images_are_common(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    config = {**second.config(), "threat": {"norm": "l2", "eps": 0.1}}
    second.config_file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="second and first were trained for different threat models"):
        comparison_table([first, second])


def test_an_attack_that_only_one_checkpoint_met_does_not_spoil_the_table(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    first.write_evaluation("last", "pgd-50", result(0.2))
    assert cells(first, second) == cells(make(tmp_path / "x" / "first"), make(tmp_path / "x" / "second"))


def test_runs_without_an_attack_in_common_are_refused(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    for checkpoint in ("last", "best"):
        for attack in ("clean", "pgd-20"):
            (second.path / "evals" / checkpoint / f"{attack}.json").rename(
                second.path / "evals" / checkpoint / f"{attack}-other.json"
            )
    with pytest.raises(InputError, match=r"no attack in common"):
        comparison_table([first, second])


def test_a_run_without_evaluation_is_refused_with_the_command_that_finishes_it(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"data": {"name": "digits"}}, {})
    with pytest.raises(InputError, match=r"no evaluation yet; finish it with `toughen train --resume .*run`"):
        comparison_table([run])


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="nothing to compare"):
        comparison_table([])


@pytest.mark.parametrize("file", ["evals/last/clean.json", "log.jsonl", "criticality/epoch_0001.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, file):
    run = make(tmp_path / "run")
    run.write_report(1, report("a"))
    (run.path / file).write_text('{"accuracy": 0.}')
    with pytest.raises(InputError, match=rf"{file} is damaged"):
        (run.log(), run.evaluations("last"), run.reports())


# -- figures ------------------------------------------------------------------------------------------


def num_colours(file: Path) -> int:
    """How many colours a picture has; an empty one has one."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    return len(colours)


def test_accuracies_over_epochs_are_drawn_with_a_line_for_each_branch(tmp_path):
    run = make(tmp_path / "run", branches=("clat",))
    plot_training(run, tmp_path / "alone.png")
    make(run.branch("clat").path).write_log([row(4), row(5)])
    plot_training(run, tmp_path / "both.png")
    assert num_colours(tmp_path / "alone.png") > 10
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "alone.png").read_bytes()


def test_criticality_over_time_is_drawn_with_a_column_for_each_selection(tmp_path):
    run = make(tmp_path / "run")
    run.write_report(1, report("a"))
    run.write_report(2, report("b"))
    plot_criticality(run, tmp_path / "criticality.png")
    assert num_colours(tmp_path / "criticality.png") > 10


def test_one_report_is_drawn_as_bars(tmp_path):
    plot_report(report("a"), tmp_path / "report.png")
    assert num_colours(tmp_path / "report.png") > 10


def test_a_run_folder_is_plain_files_that_other_programs_can_read(tmp_path):
    run = make(tmp_path / "run")
    assert json.loads((run.path / "log.jsonl").read_text().splitlines()[1])["epoch"] == 2
    assert json.loads((run.path / "evals" / "best" / "pgd-20.json").read_text())["accuracy"] == 0.445
