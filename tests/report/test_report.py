import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from written_runs import make, make_family, result, row, write_evaluation

from toughen.errors import InputError
from toughen.report import compare_runs, comparison_tables, plot_criticality, plot_report, plot_training
from toughen.report.tables import accuracy_table
from toughen.run_folder import RunFolder


def shown(*runs: RunFolder) -> str:
    text = StringIO()
    Console(file=text, width=200).print(comparison_tables(compare_runs(runs)))
    return text.getvalue()


def cells(*runs: RunFolder) -> dict[str, list[str]]:
    table = accuracy_table(compare_runs(runs))
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
    assert found == {"run": ["PGD-AT", "3", "81.2 ±2.5 (82.3)", "43.4 ±3.1 (44.5)", "100.0 %", "2.00", "1.00"]}


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


def test_the_tables_say_how_many_images_the_threat_model_and_the_interval(tmp_path):
    text = " ".join(shown(make(tmp_path / "run")).split())
    assert "1000 test images" in text
    assert "linf, eps 0.1" in text
    assert "95 % Wilson interval" in text


def test_an_attack_with_other_images_says_how_many(tmp_path):
    run = make(tmp_path / "run")
    write_evaluation(run, "last", "standard", result(0.4, n=50, images="first 50"))
    table = accuracy_table(compare_runs([run]))
    assert [str(column.header) for column in table.columns[3:6]] == [
        "clean (n 1000)",
        "pgd-20 (n 1000)",
        "standard (n 50)",
    ]


def test_an_attack_on_the_last_checkpoint_alone_has_no_figure_for_the_best(tmp_path):
    run = make(tmp_path / "run")
    write_evaluation(run, "last", "pgd-50", result(0.4))
    assert cells(run)["run"][3:5] == ["43.4 ±3.1 (44.5)", "40.0 ±3.1"]


def test_seeds_share_a_row_with_mean_and_extremes(tmp_path):
    found = cells(*(make(tmp_path / f"run-{seed}", seed=seed, pgd=0.4 + 0.02 * seed) for seed in range(3)))
    assert list(found) == ["run (3 seeds)"]
    assert found["run (3 seeds)"][3] == "42.0 [40.0-44.0] (44.5)"


def test_differences_stand_below_with_their_interval_and_p_value(tmp_path):
    run = make_family(tmp_path / "run", base=0.434, clat=0.404)
    text = " ".join(shown(run).split())
    assert "differences on the same 1000 test images" in text
    # 30 images that base alone gets right
    assert "run/clat run/base images +0.0 [ -0.4, +0.4] p 1.000 -3.0 [ -4.3, -2.1] p<0.001" in text
    assert "exact McNemar" in text
    assert "Student" not in text


def test_differences_over_seeds_have_an_interval_only_where_seeds_differ(tmp_path):
    runs = [make_family(tmp_path / f"run-{seed}", seed=seed, base=0.43, clat=0.40 + 0.01 * seed) for seed in (0, 1)]
    text = " ".join(shown(*runs).split())
    assert "run/clat run/base 2 seeds +0.0 [equal by seed] -2.5 [ -8.9, +3.9]" in text
    assert "Student" in text
    assert "McNemar" not in text


def test_rows_without_a_seed_in_common_say_so(tmp_path):
    runs = [make(tmp_path / f"run-{seed}", seed=seed) for seed in (0, 1)]
    text = " ".join(shown(*runs, make(tmp_path / "other", seed=2, recipe="other")).split())
    assert "other run no seed in common - -" in text


def test_one_seed_in_common_is_named_and_compared_by_images(tmp_path):
    runs = [make(tmp_path / f"run-{seed}", seed=seed, pgd=0.4 + 0.1 * seed) for seed in (0, 1)]
    text = " ".join(shown(*runs, make(tmp_path / "other", seed=1, recipe="other", pgd=0.5)).split())
    assert "other run images, seed 1 +0.0 [ -0.4, +0.4] p 1.000 +0.0 [ -0.4, +0.4] p 1.000" in text


def test_names_in_brackets_are_shown_as_they_are(tmp_path):
    assert "run[bold]" in shown(make(tmp_path / "run[bold]"))


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="nothing to compare"):
        compare_runs([])


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
