import json
import shutil

import pytest
import yaml
from written_runs import SETTINGS, make, make_family, result, row, write_evaluation

from toughen.cli import main
from toughen.errors import InputError
from toughen.report import Comparison, compare_runs


def names(comparison: Comparison) -> list[str]:
    return [found.name for found in comparison.rows]


def pairs(comparison: Comparison) -> list[tuple[str, str]]:
    return [(found.row.name, found.against.name) for found in comparison.differences]


# -- rows ---------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_share_rows_with_their_branches(tmp_path):
    runs = [make_family(tmp_path / f"at-{seed}", seed=seed, base=0.4, clat=0.3) for seed in (2, 0, 1)]
    found = compare_runs([*runs, make(tmp_path / "other", recipe="other")])
    assert names(found) == ["at", "at/base", "at/clat", "other"]
    assert [found_row.seeds for found_row in found.rows] == [(2, 0, 1)] * 3 + [(0,)]


def test_each_run_can_stand_on_its_own(tmp_path):
    runs = [make(tmp_path / f"at-{seed}", seed=seed) for seed in (0, 1)]
    assert names(compare_runs(runs, seeds="each")) == ["at-0", "at-1"]


@pytest.mark.parametrize(("seeds", "recipes"), [((0, 0), ("", "")), ((0, 1), ("", "other"))], ids=["seed", "recipe"])
def test_runs_of_one_seed_or_of_two_recipes_are_not_folded(tmp_path, seeds, recipes):
    runs = [make(tmp_path / f"at-{i}", seed=seeds[i], recipe=recipes[i]) for i in (0, 1)]
    assert names(compare_runs(runs)) == ["at-0", "at-1"]


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (("run-0", "run-1"), "run"),
        (("run", "run-2"), "run"),
        (("run-10", "run-11"), "run"),
        (("resnet18", "resnet18-2"), "resnet18"),
        (("a/seed-0", "a/seed-1"), "a"),
        (("first", "second"), "first"),
    ],
)
def test_folded_runs_are_named_by_what_their_names_share(tmp_path, folders, name):
    assert names(compare_runs([make(tmp_path / folder, seed=i) for i, folder in enumerate(folders)])) == [name]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [make(tmp_path / part / "run", recipe=part) for part in ("a", "b")]
    assert names(compare_runs(runs)) == [str(run.path) for run in runs]


def test_a_branch_that_one_seed_lacks_is_folded_over_the_others(tmp_path):
    first = make_family(tmp_path / "at-0", seed=0, base=0.4, clat=0.3)
    second = make(tmp_path / "at-1", seed=1, branches=("base", "clat"))
    make(second.branch("base").path, seed=1)
    found = compare_runs([first, second])
    assert [found_row.seeds for found_row in found.rows] == [(0, 1), (0, 1), (0,)]
    assert found.differences[0].seeds == (0,)


def test_costs_of_folded_runs_are_means(tmp_path):
    runs = [make(tmp_path / f"at-{seed}", seed=seed) for seed in (0, 1)]
    runs[1].write_log([row(1, seconds=4.0, trainable_share=0.5, gflops_per_image=1.5)])
    [found] = compare_runs(runs).rows
    assert (found.seconds, found.trained, found.flops) == (3.0, 0.75, 0.75)


def test_a_result_of_an_earlier_epoch_is_another_networks(tmp_path):
    run = make(tmp_path / "run")
    write_evaluation(run, "last", "pgd-20", result(0.9, settings=SETTINGS, epoch=2))
    assert compare_runs([run]).attacks == ("clean",)


def test_incomplete_results_are_ignored(tmp_path):
    run = make(tmp_path / "run")
    write_evaluation(run, "last", "standard", result([1, 0], complete=False))
    assert compare_runs([run]).attacks == ("clean", "pgd-20")


def test_an_attack_that_only_some_have_met_is_left_out_and_named(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second", recipe="other")
    write_evaluation(first, "last", "pgd-50", result(0.2))
    found = compare_runs([first, second])
    assert (found.attacks, found.left_out) == (("clean", "pgd-20"), ("pgd-50",))


# -- differences --------------------------------------------------------------------------------------


def test_a_branch_is_compared_with_the_first_of_its_run_and_a_run_with_the_first_given(tmp_path):
    first = make_family(tmp_path / "first", base=0.4, clat=0.3)
    second = make_family(tmp_path / "second", recipe="second", base=0.4, clat=0.3, lora=0.2)
    third = make(tmp_path / "third", recipe="third")
    assert pairs(compare_runs([first, second, third])) == [
        ("first/clat", "first/base"),
        ("second/base", "first/base"),
        ("second/clat", "second/base"),
        ("second/lora", "second/base"),
        ("third", "first/base"),
    ]


def test_a_run_alone_without_branches_differs_from_nothing(tmp_path):
    assert compare_runs([make(tmp_path / "run")]).differences == ()


def test_a_difference_counts_the_images_that_only_one_gets_right(tmp_path):
    first = make(tmp_path / "first", pgd=[1, 1, 1, 0, 0, 1], pgd_best=[1] * 6)
    second = make(tmp_path / "second", recipe="other", pgd=[0, 1, 0, 1, 0, 0], pgd_best=[1] * 6)
    [difference] = compare_runs([first, second]).differences
    [pair] = difference.attacks["pgd-20"].networks
    assert (pair.only_first, pair.only_second, pair.n) == (1, 3, 6)
    assert pair.difference == pytest.approx(-2 / 6)
    assert pair.p_value == pytest.approx(2 * (1 + 4) / 2**4)


def test_folded_runs_are_paired_by_seed(tmp_path):
    plain = [make(tmp_path / f"at-{seed}", seed=seed, pgd=0.4 + 0.1 * seed) for seed in (0, 1, 2)]
    other = [make(tmp_path / f"b-{seed}", seed=seed, recipe="b", pgd=0.45 + 0.11 * seed) for seed in (2, 1, 3)]
    [difference] = compare_runs([*plain, *other]).differences
    assert difference.seeds == (2, 1)
    assert difference.attacks["pgd-20"].seeds.values == pytest.approx((0.07, 0.06))


def test_two_single_runs_are_paired_by_images_whatever_their_seeds(tmp_path):
    first = make(tmp_path / "first", seed=0, pgd=0.4)
    second = make(tmp_path / "second", seed=1, recipe="other", pgd=0.5)
    [difference] = compare_runs([first, second]).differences
    assert difference.attacks["pgd-20"].networks[0].only_first == 100


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unlike", "said"),
    [
        ({"settings": {**SETTINGS, "steps": 10}}, r"evaluated alike \(pgd-20: steps 10 and 20\)"),
        (
            {"settings": {**SETTINGS, "threat": {"norm": "linf", "eps": 0.2}}},
            r"evaluated alike \(pgd-20: threat eps 0.2 and 0.1\)",
        ),
        ({"images_sha256": "others"}, r"different test images \(pgd-20: n 1000 of digits"),
        ({"index": list(range(1000, 0, -1))}, "different test images"),
        ({"seed": 5}, r"one seed but evaluated with two \(pgd-20: 5 and 0\)"),
    ],
    ids=["steps", "eps", "images", "order", "seed"],
)
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_results_that_were_not_measured_alike_are_refused(tmp_path, unlike, said, checkpoint):
    first, second = make(tmp_path / "first"), make(tmp_path / "second", recipe="other")
    write_evaluation(first, "last", "pgd-20", result(0.3, settings=SETTINGS, index=list(range(1000))))
    write_evaluation(second, checkpoint, "pgd-20", {**result(0.3, settings=SETTINGS), **unlike})
    with pytest.raises(InputError, match=rf"second \({checkpoint}\) and .*first \(last\) .*{said}"):
        compare_runs([first, second])


def test_runs_on_different_data_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"second .* and .*first .* were evaluated on different test images .*cifar10"):
        compare_runs([make(tmp_path / "first"), make(tmp_path / "second", data="cifar10")])


def test_runs_for_different_threat_models_are_refused_even_if_only_clean_images_are_common(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    second.config_file.write_text(yaml.safe_dump({**second.config(), "threat": {"norm": "l2", "eps": 0.1}}))
    with pytest.raises(
        InputError, match=r"second and .*first were trained for different threat models \(l2 eps 0.1; linf eps 0.1\)"
    ):
        compare_runs([first, second])


def test_seeds_of_evaluations_may_differ_with_those_of_training(tmp_path):
    runs = [make(tmp_path / f"run-{seed}", seed=seed) for seed in (0, 1)]
    assert len(compare_runs(runs).rows) == 1
    assert len(compare_runs(runs, seeds="each").rows) == 2


def test_runs_without_an_attack_in_common_are_refused(tmp_path):
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    for attack in ("clean", "pgd-20"):
        file = second.evals("last") / f"{attack}.json"
        file.rename(file.with_name(f"{attack}-other.json"))
    with pytest.raises(InputError, match=r"no attack in common"):
        compare_runs([first, second])


def test_a_run_without_evaluation_is_refused_with_the_command_that_finishes_it(tmp_path):
    run = make_family(tmp_path / "run", clat=0.3)
    shutil.rmtree(run.branch("clat").path / "evals")
    with pytest.raises(InputError, match=r"clat has no evaluation yet; finish it with `toughen train --resume .*run`"):
        compare_runs([run])


def test_a_finished_run_without_evaluation_is_refused_with_the_command_that_measures_it(tmp_path):
    run = make_family(tmp_path / "run", clat=0.3)
    branch = run.branch("clat")
    shutil.rmtree(branch.path / "evals")
    branch.write_finished({})
    with pytest.raises(InputError, match=r"clat has no evaluation; measure it with `toughen evaluate .*/clat`"):
        compare_runs([run])


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_without_its_log_is_refused(tmp_path, finished):
    run = make(tmp_path / "run")
    (run.path / "log.jsonl").unlink()
    if finished:
        run.write_finished({})
    with pytest.raises(InputError, match=r"lost its log\.jsonl" if finished else "train --resume"):
        compare_runs([run])


# -- plain values, and the command --------------------------------------------------------------------


def test_the_plain_values_hold_accuracies_differences_and_what_was_done(tmp_path):
    runs = [make_family(tmp_path / f"at-{seed}", seed=seed, base=0.43, clat=0.40 + 0.01 * seed) for seed in (0, 1)]
    write_evaluation(runs[0], "last", "pgd-50", result(0.2))
    found = json.loads(json.dumps(compare_runs(runs).to_dict(), allow_nan=False))
    assert (found["data"], found["confidence"], found["left_out"]) == ("digits", 0.95, ["pgd-50"])
    assert found["attacks"]["pgd-20"] == {"n": 1000, "settings": SETTINGS}
    clat = found["rows"][2]
    assert (clat["run"], clat["seeds"], clat["epochs"]) == ("at/clat", [0, 1], [3, 3])
    assert clat["folders"] == [str(run.branch("clat").path) for run in runs]
    last = clat["accuracies"]["pgd-20"]["last"]
    assert last["seeds"]["values"] == [0.40, 0.41]
    assert last["intervals"][0]["low"] < 0.40 < last["intervals"][0]["high"]
    [difference] = found["differences"]
    assert (difference["run"], difference["against"], difference["seeds"]) == ("at/clat", "at/base", [0, 1])
    assert difference["attacks"]["pgd-20"]["seeds"]["mean"] == pytest.approx(-0.025)
    assert [pair["only_second"] for pair in difference["attacks"]["pgd-20"]["networks"]] == [30, 20]


def test_the_command_folds_shows_each_and_writes_json(tmp_path, capsys):
    words = ["compare", *(str(make(tmp_path / f"at-{seed}", seed=seed).path) for seed in (0, 1))]
    file = tmp_path / "comparison.json"
    assert main([*words, "--json", str(file)]) == 0
    assert "at (2 seeds)" in capsys.readouterr().out
    assert [found["run"] for found in json.loads(file.read_text())["rows"]] == ["at"]
    assert main([*words, "--each"]) == 0
    said = capsys.readouterr().out
    assert "at-0" in said
    assert "at-1" in said


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_shown(tmp_path, capsys):
    assert main(["compare", str(make(tmp_path / "run").path), "--json", str(tmp_path / "gone" / "x.json")]) == 2
    said = capsys.readouterr()
    assert "there is no folder" in said.err
    assert said.out == ""
