"""What the paper's rows mean: values, networks, recipes, runs."""

import math
import re
from pathlib import Path

import pytest
import yaml

from toughen.config import resolve
from toughen.errors import InputError
from toughen.paper import FIGURES, SCALES, Network, PaperRow, Piece, make_plan, networks, paper_rows, pieces
from toughen.paper.networks import ARCHITECTURES, remarks, with_layers
from toughen.paper.plan import Plan, sweep_document
from toughen.sweep import Resources, read_sweep

TABLES = range(1, 21)
ROWS = [row for table in TABLES for row in paper_rows(table)]


def plan(name: str = "all", *, scale: str = "full", seeds: int = 1) -> Plan:
    return make_plan(pieces(name), SCALES[scale], seeds=seeds, clat={}, paths={})


@pytest.mark.parametrize(
    ("table", "dataset", "model", "method", "metric", "value"),
    [
        (1, "CIFAR-10", "DN121", "PGD-AT", "clean", 80.05),
        (1, "CIFAR-100", "WRN34-10", "TRADES+CLAT", "pgd10", 33.56),
        (2, "CIFAR-10", "RN18", "PGD-AT+CLAT", "autoattack", 42.86),
        (7, "CIFAR-10", "RN50", "CLAT random layers", "autoattack", 40.29),
        (16, "ImageNet", "RN50", "PGD-AT+CLAT", "pgd10", 36.91),
        (20, "CIFAR-10", "RN18", "CLAT smallest C", "clean", 82.56),
    ],
)
def test_values_are_as_printed(table: int, dataset: str, model: str, method: str, metric: str, value: float) -> None:
    [row] = [r for r in paper_rows(table) if (r.dataset, r.model, r.method) == (dataset, model, method)]
    assert row.values[metric] == value


def test_cells_in_doubt_say_why() -> None:
    doubtful = [row for row in ROWS if row.doubtful]
    assert len(doubtful) > 20
    assert all(row.note and set(row.doubtful) <= row.values.keys() for row in doubtful)


def test_percentages_are_percentages() -> None:
    assert all(
        0 < value < 100
        for row in ROWS
        for metric, value in row.values.items()
        if isinstance(value, float) and not metric.endswith("_s")
    )


def test_a_table_that_the_paper_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="no Table 21; it has tables 1 to 20"):
        paper_rows(21)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("piece", pieces("all"), ids=str)
def test_every_network_of_a_table_or_figure_can_be_trained(piece: Piece, scale: str) -> None:
    found = make_plan([piece], SCALES[scale], seeds=1, clat={}, paths={})  # each recipe is resolved
    runs = {run.name: run.recipe for run in found.sweep.runs}
    for network in piece.needs():
        if network in found.impossible:
            assert network.from_published(SCALES[scale])
            assert re.search("no published weights for CIFAR-100|give it with --weights", found.impossible[network])
        else:
            recipe = runs[f"{network.run_name(SCALES[scale])}/seed-0"]
            branch = network.branch(SCALES[scale])
            assert branch is None or branch in recipe.branches


def test_a_run_is_shared_by_all_that_need_it() -> None:
    found = plan(scale="full")
    names = [run.name for run in found.sweep.runs]
    assert len(names) == len(set(names))
    assert {str(piece) for piece in found.needed_by["cifar10-densenet121-pgd-at"]} >= {"table-1", "table-7", "figure-3"}


def test_seeds_come_one_after_another_so_that_tables_fill_early() -> None:
    seeds = [run.seed for run in plan("7", seeds=3).sweep.runs]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}


def test_the_papers_settings_are_those_of_section_4_1() -> None:
    [run] = plan("9", scale="full").sweep.runs[:1]
    recipe = run.recipe
    assert (recipe.threat.norm, recipe.threat.eps) == ("linf", 0.03)
    assert (recipe.attack.step_size, recipe.attack.steps, recipe.attack.random_start) == (0.007, 10, True)
    assert (recipe.train.epochs, recipe.branch_epoch) == (100, 50)
    assert (recipe.train.lr, recipe.train.schedule) == (0.1, "cosine")
    clat = recipe.branches["clat"].method.methods[-1]
    assert (clat.k, clat.every, clat.base, clat.feature_norm, clat.norm_stats) == (5, 10, "clean_ce", "l2", "update")


def test_the_numbers_of_critical_layers_are_the_papers() -> None:
    assert {name: one.k for name, one in ARCHITECTURES.items() if name != "PreAct-RN18"} == {
        "DN121": 5,
        "WRN70-16": 4,
        "RN50": 3,
        "WRN34-10": 2,
        "VGG19": 1,
        "RN18": 1,
    }


@pytest.mark.parametrize("base", ["awp", "twins"])
def test_what_shapes_the_step_stands_around_the_loss_that_clat_puts_in_place(base: str) -> None:
    document = Network("CIFAR-10", "RN18", base, "clat").document(SCALES["full"], clat={})
    assert [method["name"] for method in document["branches"]["clat"]["method"]] == ["pgd-at", "clat-paper", base]


def test_with_the_inner_loss_it_stays_where_the_base_has_it() -> None:
    document = Network("CIFAR-10", "RN18", "awp", "clat").document(SCALES["full"], clat={"base": "inner", "lam": 0})
    assert [method["name"] for method in document["branches"]["clat"]["method"]] == ["pgd-at", "awp", "clat-paper"]


def test_settings_of_clat_replace_the_literal_ones() -> None:
    document = Network("CIFAR-10", "RN18", going_on="clat").document(SCALES["full"], clat={"lam": 0.5, "every": 5})
    [_, clat] = document["branches"]["clat"]["method"]
    assert (clat["lam"], clat["every"], clat["k"]) == (0.5, 5, 1)
    with pytest.raises(InputError, match=r"unknown .*'lamb'"):
        make_plan(pieces("9"), SCALES["full"], seeds=1, clat={"lamb": 1}, paths={})


def test_published_weights_go_on_at_the_rate_that_a_schedule_has_half_way() -> None:
    weights = {"Engstrom2019Robustness": "somewhere.pt"}
    network = Network("CIFAR-10", "RN50", "engstrom2019", "clat")
    recipe = resolve(network.document(SCALES["full"], clat={}, weights=weights))
    assert recipe.model.weights == "somewhere.pt"
    assert recipe.train.epochs == 50
    assert math.isclose(recipe.train.lr, 0.05)
    whole = resolve(Network("CIFAR-10", "RN50").document(SCALES["full"], clat={})).train
    assert math.isclose(recipe.train.lr_at(0), whole.lr_at(0.5))
    assert recipe.train.lr_at(0.5) > whole.lr_at(0.75)


def test_without_their_file_published_weights_can_not_be_had_and_it_is_said_how() -> None:
    found = make_plan(pieces("2"), SCALES["full"], seeds=1, clat={}, paths={})
    reason = found.impossible[Network("CIFAR-10", "RN50", "engstrom2019")]
    assert reason.endswith("give it with --weights Engstrom2019Robustness=FILE")
    weights = {"Engstrom2019Robustness": "somewhere.pt"}
    found = make_plan(pieces("2"), SCALES["full"], seeds=1, clat={}, paths={}, weights=weights)
    assert not any(network.base == "engstrom2019" for network in found.impossible)
    assert "cifar10-resnet50-engstrom2019-clat" in found.needed_by
    assert "cifar10-resnet50-engstrom2019-base" not in found.needed_by


@pytest.mark.parametrize(("scale", "start", "epochs"), [("full", 110, 120), ("short", 33, 36), ("digits", 11, 12)])
def test_rift_tunes_for_10_epochs_after_the_110_of_appendix_d_9(scale: str, start: int, epochs: int) -> None:
    rows = [row for row in paper_rows(1) if "RiFT" in row.method]
    assert len(rows) == 12
    runs = {run.name: run.recipe for run in plan("1", scale=scale).sweep.runs}
    for row in rows:
        [network] = networks(row)
        recipe = runs[f"{network.run_name(SCALES[scale])}/seed-0"]
        assert (recipe.branch_epoch, recipe.train.epochs, list(recipe.branches)) == (start, epochs, ["rift"])
        rift = recipe.branches["rift"]
        tuned = rift.method.methods[-1]
        # its authors' rate, a hundredth of the one before
        assert (rift.train.epochs, tuned.lr, tuned.lr_scale) == (epochs, "restart", 0.01)


def test_a_figure_over_numbers_of_layers_refuses_another_number_for_all() -> None:
    with pytest.raises(InputError, match=r"figure-3, figure-7 vary the number of layers; leave k out of --clat"):
        make_plan(pieces("all"), SCALES["full"], seeds=1, clat={"k": 2}, paths={})


def test_each_difference_is_told_with_the_rows_that_it_is_about() -> None:
    full, digits = SCALES["full"], SCALES["digits"]
    assert remarks(PaperRow(1, "CIFAR-10", "RN18", "PGD-AT", {}), full) == []
    [said] = remarks(PaperRow(15, "Imagenette", "RN50", "PGD-AT", {}), full)
    assert said == "Imagenette at 64 pixels, which the paper does not say"
    row = PaperRow(2, "CIFAR-10", "RN50", "(Madry et al. 2019)", {})
    assert remarks(row, full) == ["(Madry et al. 2019) is Engstrom2019Robustness of RobustBench"]
    assert remarks(row, digits) == []
    [said] = remarks(PaperRow(1, "CIFAR-10", "RN18", "AutoLoRA", {}), full)
    assert said == "AutoLoRA starts from random weights, the paper's from ImageNet's"


def test_figures_of_another_measurement_are_marked() -> None:
    marked = [(row.table, row.method, metric) for row in ROWS for metric in row.another]
    assert {(1, "Peng2023", "pgd10"), (14, "CLAT fixed layers", "pgd10"), (18, "AWP", "pgd10")} <= set(marked)
    assert all(row.another.keys() <= row.values.keys() - set(row.doubtful) for row in ROWS)


def test_the_figures_number_of_layers_that_is_the_papers_own_is_the_tables_network() -> None:
    assert with_layers(Network("CIFAR-10", "DN121"), 5).going_on == "clat"
    assert with_layers(Network("CIFAR-10", "DN121"), 8).going_on == "clat-k8"


def test_a_mixture_is_of_two_networks_and_clat_is_in_the_robust_one() -> None:
    accurate, robust = networks(PaperRow(1, "CIFAR-10", "WRN70-16", "Bai2024+CLAT", {}))
    assert (accurate.base, accurate.going_on) == ("clean", "base")
    assert (robust.base, robust.going_on) == ("pgd-at", "clat")


@pytest.mark.parametrize("word", ["5", "table5", "table-5", "Table 5"])
def test_a_table_has_several_names(word: str) -> None:
    assert pieces(word) == [Piece("table", 5)]


@pytest.mark.parametrize("word", ["figure2", "fig-2", "figure-2"])
def test_a_figure_has_several_names(word: str) -> None:
    assert pieces(word) == [Piece("figure", 2)]


@pytest.mark.parametrize("word", ["0", "21", "figure-1", "figure-8", "five", ""])
def test_what_the_paper_lacks_is_refused(word: str) -> None:
    with pytest.raises(InputError, match=r"name a table \(1 to 20\), a figure \(figure-2, .*figure-7\), or all"):
        pieces(word)


@pytest.mark.parametrize("piece", pieces("all"), ids=str)
def test_the_files_of_the_recipes_are_the_runs_of_the_tables(piece: Piece) -> None:
    file = Path(__file__).parents[2] / "recipes" / "paper" / f"{piece}.yaml"
    found = make_plan([piece], SCALES["full"], seeds=1, clat={}, paths={}, resources=Resources(gpus=1))
    assert yaml.safe_load(file.read_text()) == sweep_document(found, seeds=10)


@pytest.mark.parametrize("name", ["table-1", "table-13", "table-18", "table-19", "figure-2", "figure-6"])
def test_a_file_for_sweep_means_the_same_runs(name: str, tmp_path: Path) -> None:
    found = plan(name, scale="digits", seeds=2)
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(sweep_document(found, seeds=2), sort_keys=False))
    read = {run.name: run.document for run in read_sweep(str(tmp_path / "runs.yaml")).runs}
    assert read.keys() == {run.name for run in found.sweep.runs}
    for run in found.sweep.runs:
        assert {**read[run.name], "description": ""} == {**run.document, "description": ""}


def test_figures_show_each_curve_once() -> None:
    for figure in FIGURES.values():
        assert len({(curve.label, curve.x) for curve in figure.curves}) == len(figure.curves)
