from pathlib import Path
from typing import Any

import pytest
from grids import GRID, write

from small_runs import document
from toughen.config import load_recipe, resolve
from toughen.errors import InputError
from toughen.sweep import Resources, read_sweep


def names(file: Path) -> list[str]:
    return [run.name for run in read_sweep(str(file)).runs]


def refused(file: Path) -> str:
    with pytest.raises(InputError) as error:
        read_sweep(str(file))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_runs_grid_and_seeds_are_multiplied_and_named_by_what_differs(tmp_path: Path) -> None:
    runs = {"plain": {}, "long": {"train.epochs": 3}}
    grid = {"train.lr": [0.1, 0.05], "threat.eps": ["8/255"]}

    assert names(write(tmp_path, runs=runs, grid=grid, seeds=[3, 1])) == [
        "plain,lr-0.1/seed-3",
        "plain,lr-0.1/seed-1",
        "plain,lr-0.05/seed-3",
        "plain,lr-0.05/seed-1",
        "long,lr-0.1/seed-3",
        "long,lr-0.1/seed-1",
        "long,lr-0.05/seed-3",
        "long,lr-0.05/seed-1",
    ]


def test_each_run_has_the_settings_that_the_command_line_would_give_it(tmp_path: Path) -> None:
    changes = {"recipe": "digits", "grid": {"train": [{"lr": 0.2, "epochs": 31}], "method.0.name": ["trades"]}}

    [run] = read_sweep(str(write(tmp_path, **changes, seeds=[4]))).runs

    assert run.recipe == load_recipe(
        "digits", ["train.lr=0.2", "train.epochs=31", "method.0.name=trades", "train.seed=4"]
    )


def test_without_seeds_the_recipe_keeps_its_own(tmp_path: Path) -> None:
    assert names(write(tmp_path, recipe=document(train={"seed": 7}), grid=GRID)) == ["pgd-at/seed-7", "trades/seed-7"]


def test_methods_are_named_by_settings_only_where_names_are_not_enough(tmp_path: Path) -> None:
    stacks = [[{"name": "pgd-at"}, {"name": "clat", "k": k}] for k in (1, 3)]

    assert names(write(tmp_path, grid={"method": stacks})) == ["pgd-at+clat-k-1/seed-0", "pgd-at+clat-k-3/seed-0"]


def test_keys_that_end_alike_are_named_in_full(tmp_path: Path) -> None:
    grid = {"attack.step_size": [0.1, 0.2], "evaluate.step_size": [0.1, 0.2]}

    assert names(write(tmp_path, grid=grid))[0] == "attack.step_size-0.1,evaluate.step_size-0.1/seed-0"


def test_a_recipe_file_is_found_beside_the_file_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: digits\ntrain: {lr: 0.3}\n")

    for recipe in ("base.yaml", {"extends": "base.yaml"}):
        [run] = read_sweep(str(write(tmp_path, recipe=recipe))).runs
        assert run.recipe.train.lr == 0.3


def test_what_is_stored_of_a_run_resolves_to_the_same_run(tmp_path: Path) -> None:
    for run in read_sweep(str(write(tmp_path, grid=GRID, seeds=2))).runs:
        assert resolve(run.document) == run.recipe


@pytest.mark.parametrize(
    "keys",
    [
        {"recipe": "digits", "grid": {"model.name": ["preact_resnet18"]}},
        {"recipe": {"extends": "digits", "model": {"name": "preact_resnet18"}}},
    ],
)
def test_another_network_comes_with_its_own_width(tmp_path: Path, keys: dict[str, Any]) -> None:
    [run] = read_sweep(str(write(tmp_path, **keys))).runs

    assert run.document["model"]["width"] is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sedes": 3}, ("'sedes'", "did you mean 'seeds'", "grid.yaml")),
        ({"seeds": 0}, ("seeds is 0", "1 to 10000")),
        ({"seeds": [1, 1]}, ("seeds is [1, 1]", "each once")),
        ({"retries": -1}, ("retries is -1", "0 to 100")),
        ({"name": "../up"}, ("'../up'", "letters")),
        ({"name": "lr=1"}, ("'lr=1'", "letters")),
        ({"runs": {"a/b": {}}}, ("'a/b'", "letters")),
        ({"runs": {"a": {}, "A": {}}}, ("'a' and 'A'", "rename")),
        ({"grid": {"train.lr": 0.1}}, ("sweep.grid.train.lr is 0.1: input should be a valid list",)),
        ({"grid": {"train.lr": []}}, ("grid.train.lr is empty",)),
        ({"grid": {"train.lr": [0.1, 0.1]}}, ("grid.train.lr", "0.1", "twice")),
        ({"grid": {"train.seed": [0, 1]}}, ("train.seed", "seeds")),
        (
            {"grid": {"train.lr": [1]}, "runs": {"a": {"train": {"lr": 2}}}},
            ("sets train.lr and then train.lr",),
        ),
        ({"grid": {"method": [1]}, "runs": {"a": {"method.0.k": 2}}}, ("run 'a' sets method.0.k and then method,",)),
        ({"grid": {"train": [{"lr": 1}], "train.lr": [2]}}, ("the grid sets train.lr and then train.lr",)),
        ({"runs": {"字" * 70: {}}}, ("run name '字", "at most 200 bytes")),
        ({"grid": {"train.lr": [1, 2]}, "runs": {"字" * 66: {}}}, ("(203 bytes, at most 200)",)),
        ({"resources": {"cpus": 0}}, ("resources.cpus is 0",)),
        ({"resources": {"gpus": 2}}, ("resources.gpus is 2", "torchrun")),
        ({"resources": {"gpu": 1}}, ("'gpu'", "gpus")),
        ({"recipe": "digitz"}, ("'digitz'", "'digits'", "grid.yaml")),
        ({"grid": {"train.lr": [0.1, "fast"]}}, ("run lr-fast (train.lr=fast)", "train.lr is 'fast'", "number")),
        ({"grid": {"train.rate": [0.1]}}, ("train.rate=0.1", "'rate'", "Allowed")),
        ({"grid": {"method.4.k": [1]}}, ("method.4", "list of 1")),
        ({"runs": {"a": {}, "b": {"train.lr": 0.05}}}, ("a/seed-0 and b/seed-0 are the same run",)),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, keys: dict[str, Any], expected: tuple[str, ...]) -> None:
    said = refused(write(tmp_path, **keys))

    assert "grid.yaml" in said
    for part in expected:
        assert part in said


def test_a_file_that_names_code_is_refused_until_its_package_is_allowed(tmp_path: Path) -> None:
    file = write(tmp_path, grid={"method": [[{"name": "nobodys_methods:HalfAndHalf"}]]})

    assert "--allow-code nobodys_methods" in refused(file)
    with pytest.raises(InputError, match="cannot be imported"):
        read_sweep(str(file), allow_code=["nobodys_methods"])


def test_there_is_no_such_file_or_it_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "tag.yaml").write_text("recipe: !!python/object/apply:os.getcwd []\n")

    assert "no sweep file" in refused(tmp_path / "none.yaml")
    assert "must be a mapping" in refused(tmp_path / "list.yaml")
    assert "tag.yaml" in refused(tmp_path / "tag.yaml")
    with pytest.raises(InputError, match="did you mean 'digits_methods'"):
        read_sweep("digits_method")


def test_a_run_computes_with_as_many_threads_as_it_has_cores() -> None:
    assert [Resources(cpus=cpus).threads for cpus in (0.5, 1, 4)] == [1, 1, 4]
