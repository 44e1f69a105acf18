from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_runs import PGD_AT, clat, document
from toughen.config import load_recipe, read_document, recipe_names, resolve
from toughen.errors import InputError
from toughen.methods import CLAT, CLATPaper
from toughen.objectives import PGDAT

NAMES = sorted(recipe_names())

# stored paths are absolute
GENERATED = ["data.extra.path=/1m.npz"]
ABSOLUTE = {"own_images": ["data.path=/images"], "wang2023_wrn28_10": GENERATED, "peng2023_rawrn70_16": GENERATED}


# -- the recipes that come with the package -----------------------------------------------------------


def test_the_recipes_of_the_first_milestone_are_there():
    assert {"digits", "cifar10_smoke", "cifar10_tiny", "cifar10_resnet18_pgdat_clat"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_packaged_recipe_resolves_and_says_in_a_line_what_it_is_for(name):
    recipe = load_recipe(name)
    assert recipe.description.strip()
    assert recipe_names()[name] == recipe.description.strip().splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_form_of_a_recipe_resolves_to_the_same_recipe(name):
    recipe = load_recipe(name, ABSOLUTE.get(name, []))
    stored = yaml.safe_load(yaml.safe_dump(recipe.document(), sort_keys=False))
    assert resolve(stored) == recipe


def test_the_stored_form_holds_defaults_so_that_it_keeps_its_meaning():
    source = load_recipe("digits").document()
    assert source["train"]["gamma"] == 0.1
    assert source["attack"]["restarts"] == 1
    assert source["threat"]["bounds"] == [0.0, 1.0]


def test_the_paper_recipe_has_the_paper_s_settings():
    recipe = load_recipe("cifar10_resnet18_pgdat_clat")
    assert (recipe.threat.norm, recipe.threat.eps) == ("linf", 0.03)
    assert (recipe.attack.step_size, recipe.attack.steps) == (0.007, 10)
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.schedule) == (100, 0.1, "cosine")
    inner, outer = recipe.method.methods
    assert inner == PGDAT()
    assert isinstance(outer, CLAT)
    assert (outer.k, outer.start_epoch, outer.every, outer.base) == (1, 50, 10, "clean_ce")
    assert recipe.method.label == "PGD-AT + CLAT"


# -- numbers ------------------------------------------------------------------------------------------


def test_fractions_and_powers_of_ten_are_numbers():
    recipe = load_recipe("digits", ["threat.eps=8/255", "attack.step_size=2/255", "train.lr=5e-2"])
    assert (recipe.threat.eps, recipe.attack.step_size, recipe.train.lr) == (8 / 255, 2 / 255, 0.05)


# -- overrides ----------------------------------------------------------------------------------------


def test_an_override_reaches_into_sections_lists_and_branches():
    words = ["train.epochs=40", "branches.clat.method.1.k=3", "data.train_samples=null", "model.width=8"]
    recipe = load_recipe("digits", words)
    assert recipe.train.epochs == recipe.branches["clat"].train.epochs == 40
    assert recipe.branches["clat"].method.methods[1].k == 3
    assert recipe.data.train_samples is None
    assert recipe.model.width == recipe.branches["clat"].model.width == 8


def test_an_override_may_hold_a_list_or_a_mapping():
    recipe = load_recipe("digits", ["evaluate.attacks=[clean, pgd-5]", "branches={one: {train: {lr: 0.01}}}"])
    assert recipe.evaluate.attacks == ("clean", "pgd-5")
    assert {name: branch.train.lr for name, branch in recipe.branches.items()} == {"one": 0.01}


def test_branches_can_be_switched_off():
    recipe = load_recipe("digits", ["branches=null", "branch_epoch=null"])
    assert recipe.branches == {}
    assert recipe.stop_epoch == recipe.train.epochs


def test_an_override_makes_a_section_that_is_not_there():
    assert load_recipe("cifar10_smoke", ["evaluate.samples=7"]).evaluate.samples == 7


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epochs", r"override 'epochs' is not of the form key\.path=value"),
        ("=3", r"override '=3' is not of the form"),
        ("train.epochs=[", r"the value in 'train\.epochs=\[' is not valid YAML"),
        ("method.5.k=1", r"override method\.5: '5' is not a position in a list of 1; use 0 to 0"),
        ("method.clat.k=1", r"'clat' is not a position in a list of 1"),
        ("train.epochs.more=1", r"train\.epochs is 60, which has no keys"),
        ("train.epoch=1", r"unknown key in train: 'epoch'; did you mean 'epochs'\?"),
        ("trainer.epochs=1", r"unknown recipe key 'trainer'; did you mean 'train'\?"),
        ("clat.k=3", r"unknown recipe key .clat.*clat is a method: .* its entry in the list, method\.N\.SETTING"),
        ("data.augmnt=none", r"unknown key in data: 'augmnt'; did you mean 'augment'\?"),
        ("attack.stps=3", r"unknown key in attack pgd: 'stps'; did you mean 'steps'\?"),
        ("method.0.k=3", r"unknown key in method\.0 pgd-at: 'k'"),
        ("branches.clat.method.1.basis=inner", r"unknown key in method\.1 clat: 'basis'; did you mean 'base'\?"),
        ("branches.clat.method.1.criticality.nrm=rms", r"criticality: 'nrm'; did you mean 'norm'\?"),
        ("branches.clat.trainer.lr=1", r"unknown recipe key 'trainer'"),
        ("model.name=resnet81", r"unknown model 'resnet81'; did you mean 'resnet18'\?"),
        ("method.0.name=pgdat", r"unknown method 'pgdat'; did you mean 'pgd-at'\?"),
        ("attack.name=pdg", r"unknown attack 'pdg'; did you mean 'pgd'\?"),
        ("data.name=digit", r"unknown data set 'digit'; did you mean 'digits'\?"),
        ("branches.clat.method.1.select=topp", r"unknown selection rule 'topp'; did you mean 'top'\?"),
        ("train.epochs=many", r"train\.epochs is 'many': .*integer"),
        ("train.epochs=yes", r"train\.epochs is True.*number"),
        ("train.schedule=linear", r"train\.schedule is 'linear'.*'cosine'"),
        ("threat.eps=-0.1", r"eps is -0\.1; it must be a finite number >= 0"),
        ("threat.eps=.nan", r"eps is nan"),
        ("threat.norm=l1", r"norm.*'l1'.*linf"),
        ("attack.steps=0", r"attack steps is 0; it must be a whole number, at least 1"),
        ("branches.clat.method.1.k=0", r"clat k is 0"),
        ("branch_epoch=60", r"branch_epoch is 60; with train\.epochs=60 it must be 1 to 59"),
        ("branch_epoch=half", r"branch_epoch is 'half'; it must be a whole number"),
        ("branch_epoch=null", r"branches and branch_epoch go together"),
        ("branches.clat=5", r"branch 'clat' is 5; it must be a mapping"),
        ("branches.clat=[1]", r"branch 'clat' is \[1\]; it must be a mapping"),
        ("branches=7", r"branches is 7; it must map names to overrides"),
        ("branches={../up: {}}", r"branch name '\.\./up' names a folder"),
        ("branches.clat.model.width=3", r"branch 'clat' sets model.*must stay the run's"),
        ("method=pgd-at", r"method is 'pgd-at'; it must be a list"),
        ("method=[]", r"the method list is empty"),
        ("method=[{name: clat, base: inner}]", r"CLAT \(inner loss\) stands alone but .*put an objective before it"),
        ("method=[{name: pgd-at}, {name: pgd-at}]", r"PGD-AT is an objective and must come first"),
        ("attack=pgd", r"attack is 'pgd'; it must be a mapping with a name: pgd"),
        ("model=small_cnn", r"model is 'small_cnn'; it must be a mapping"),
        ("model.name=5", r"model\.name is 5: .*string"),
    ],
)
def test_a_bad_override_is_refused_with_its_key_its_value_and_the_fix(word, message):
    with pytest.raises(InputError, match=message) as refused:
        load_recipe("digits", [word])
    assert "\n" not in str(refused.value)


def test_wrong_values_of_one_section_are_named_together():
    with pytest.raises(InputError) as refused:
        load_recipe("digits", ["train.epochs=many", "train.lr=fast", "train.schedule=none"])
    assert all(f"train.{key}" in str(refused.value) for key in ("epochs", "lr", "schedule"))


# -- branches -----------------------------------------------------------------------------------------


def test_a_branch_is_the_run_with_its_changes_laid_over():
    plan = document(branch_epoch=1, branches={"slow": {"train": {"lr": 0.001}}, "clat": clat(k=2), "same": None})
    recipe = resolve(plan)
    slow, chosen, same = recipe.branches["slow"], recipe.branches["clat"], recipe.branches["same"]
    assert (slow.train.lr, slow.train.batch_size, slow.method) == (0.001, 20, recipe.method)
    assert chosen.method.label == "PGD-AT + CLAT"
    assert (same.train, same.method, same.branches) == (recipe.train, recipe.method, {})


def test_resolving_changes_nothing_in_the_document():
    plan = document(branch_epoch=1, branches={"clat": clat()})
    before = deepcopy(plan)
    resolve(plan)
    assert plan == before


# -- files --------------------------------------------------------------------------------------------


def test_a_recipe_may_be_a_file_of_your_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(document()))
    assert load_recipe(str(file), ["train.epochs=7"]).train.epochs == 7


def test_an_unknown_recipe_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown recipe 'digit'; did you mean 'digits'\?.*path of a \.yaml file"):
        read_document("digit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "not valid YAML"),
        (b"- 1\n", "is a list; it must be a mapping"),
        (b"", "is empty; it must be a mapping"),
        (b"\xff\xfe\x00", "not valid YAML|not a text file"),
        (b"train: {epochs: 1}", "the recipe lacks model, data, threat, attack, method"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load_recipe(str(file))
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(InputError, match=r"no recipe file .*gone\.yaml"):
        load_recipe(str(tmp_path / "gone.yaml"))


# -- anything at all ----------------------------------------------------------------------------------

PLACES = [
    *("model", "data", "threat", "attack", "method", "train", "evaluate", "branches", "branch_epoch", "description"),
    *("model.name", "model.width", "data.name", "data.path", "data.validation", "data.augment", "threat.eps"),
    *("threat.norm", "threat.bounds", "attack.name", "attack.steps", "attack.step_size", "attack.keep", "method.0"),
    *("method.0.name", "method.1", "method.1.k", "method.1.lam", "method.1.select", "method.1.layers"),
    *("method.1.criticality", "method.1.criticality.exclude", "method.1.every", "train.epochs", "train.lr"),
    *("train.milestones", "train.patience", "train.device", "evaluate.attacks", "evaluate.samples", "branches.one"),
    *("branches.one.train", "branches.one.method", "surprise", "train.surprise"),
]
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=6) | st.sampled_from(["8/255"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), junk), min_size=1, max_size=3))
def test_no_value_anywhere_gives_anything_but_a_recipe_or_one_clear_error(changes: list[tuple[str, Any]]):
    plan = document(method=[PGD_AT, {"name": "clat", "criticality": {}}], branch_epoch=1, branches={"one": {}})
    for path, value in changes:
        _put(plan, path.split("."), value)
    try:
        recipe = resolve(plan)
    except InputError:
        return
    assert resolve(recipe.document()) == recipe


def _put(place: Any, keys: list[str], value: Any) -> None:
    """Set a value deep inside, unless an earlier change has cut the way there."""
    for key in keys[:-1]:
        place = place.get(key) if isinstance(place, dict) else place[int(key)] if _is_in(place, key) else None
    if isinstance(place, dict):
        place[keys[-1]] = value
    elif _is_in(place, keys[-1]):
        place[int(keys[-1])] = value


def _is_in(place: Any, key: str) -> bool:
    return isinstance(place, list) and key.isdecimal() and int(key) < len(place)


def test_a_branch_may_train_with_another_attack_but_is_tested_like_its_run():
    recipe = load_recipe("digits", ["branches.pgd-at.attack.step_size=0.05"])
    branch = recipe.branches["pgd-at"]
    assert branch.attack.step_size == 0.05
    assert branch.test_step_size == recipe.test_step_size == recipe.attack.step_size


@pytest.mark.parametrize("change", ["threat.eps=0.3", "evaluate.samples=7", "evaluate.attacks=[clean]"])
def test_a_branch_that_would_be_tested_otherwise_than_its_run_is_refused(change):
    with pytest.raises(InputError, match="branch 'clat' sets threat or evaluate"):
        load_recipe("digits", [f"branches.clat.{change}"])


def test_clat_paper_takes_every_option_of_clat_and_needs_a_lambda():
    methods = "method=[{name: pgd-at}, {name: clat-paper, k: 2, every: 5, start_epoch: 3%s}]"
    recipe = load_recipe("cifar10_smoke", [methods % ", lam: 0.3"])
    clat = recipe.method.methods[1]
    assert isinstance(clat, CLATPaper)
    assert (clat.lam, clat.every, clat.norm_stats) == (0.3, 5, "update")
    assert resolve(recipe.document()) == recipe
    with pytest.raises(InputError, match="lam is missing"):
        load_recipe("cifar10_smoke", [methods % ""])


def test_another_network_does_not_inherit_the_width_of_the_recipes_own():
    assert load_recipe("digits").model.width == 16
    assert load_recipe("digits", ["model.name=timm/resnet18"]).model.width is None
    assert load_recipe("digits", ["model.name=resnet18", "model.width=8"]).model.width == 8


# -- methods of the user's own ------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = {"name": "half_and_half:HalfAndHalf", "share": 0.3}


UNFINISHED = """
from dataclasses import dataclass
from toughen.objectives import Objective

class Bare(Objective):
    label = "bare"
    def perturb(self, model, batch, attack, *, generator): ...
    def loss(self, view, adv): ...

@dataclass(frozen=True)
class Unnamed(Objective):
    def perturb(self, model, batch, attack, *, generator): ...
    def loss(self, view, adv): ...
"""


def test_a_method_of_the_user_s_own_is_named_by_its_module_and_kept_so(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    wanted = resolve(document(method=[OWN, {"name": "clat", "k": 1}]))
    assert wanted.method.label == "half and half + CLAT"
    assert wanted.document()["method"][0] == OWN
    assert resolve(wanted.document()) == wanted


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "nowhere_to_be:Found"}, r"method 'nowhere_to_be:Found' cannot be imported \(No module named"),
        ({"name": "half_and_half:HalfAndHalves"}, r"unknown function in half_and_half 'HalfAndHalves'; did you mean"),
        ({"name": "half_and_half:cross_entropy"}, r"^method 'half_and_half:cross_entropy' is no Objective"),
        ({"name": "os:system", "command": "exit 1"}, r"^method 'os:system' is no Objective and no Wrapper of toughen"),
        ({**OWN, "share": 3}, r"half-and-half share is 3\.0; it must lie in \[0, 1\]"),
        (
            {"name": "toughen.objectives:Objective"},
            r"^method 'toughen\.objectives:Objective' does not define loss;",
        ),
        (
            {"name": "unfinished_methods:Bare"},
            r"^method 'unfinished_methods:Bare' is no dataclass, so its settings could",
        ),
        (
            {"name": "unfinished_methods:Unnamed"},
            r"^method 'unfinished_methods:Unnamed' has no label, its row in tables;",
        ),
        (
            {"name": ".half_and_half:HalfAndHalf"},
            r"starts with a dot; name its module in full, as in package\.module:Half",
        ),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(method, message, monkeypatch, tmp_path):
    (tmp_path / "unfinished_methods.py").write_text(UNFINISHED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(InputError, match=message):
        resolve(document(method=[method]))


# -- a recipe on top of another -----------------------------------------------------------------------


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_recipe_extends_another_key_by_key_and_brings_its_own_methods_and_branches(tmp_path):
    own = write(
        tmp_path / "own.yaml", extends="digits", train={"lr": 0.05}, method=[{"name": "clean"}], branches={"one": {}}
    )
    wanted, base = load_recipe(own), load_recipe("digits")
    assert (wanted.train.lr, wanted.train.epochs, wanted.data) == (0.05, base.train.epochs, base.data)
    assert wanted.method.label == "clean"
    assert list(wanted.branches) == ["one"]
    further = write(tmp_path / "further.yaml", extends="own.yaml", train={"epochs": 40})
    assert load_recipe(further).train.lr == 0.05
    assert load_recipe(further).train.epochs == 40


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(InputError, match=r"a\.yaml extends itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml$"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_a_recipe_that_extends_itself_by_a_roundabout_path_is_refused(tmp_path):
    write(tmp_path / "a.yaml", extends=f"../{tmp_path.name}/a.yaml")
    with pytest.raises(InputError, match=r"a\.yaml extends itself: .*a\.yaml -> .*a\.yaml$"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_another_network_does_not_inherit_the_width_of_the_recipe_that_is_extended(tmp_path):
    for model, width in [({"name": "resnet18"}, None), ({"name": "resnet18", "width": 8}, 8), ({"mean": [0.5]}, 16)]:
        assert load_recipe(write(tmp_path / "own.yaml", extends="digits", model=model)).model.width == width


def test_a_recipe_that_extends_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown recipe 'digitz'; did you mean 'digits'"):
        load_recipe(write(tmp_path / "own.yaml", extends="digitz"))


def test_a_folder_and_an_empty_extension_are_told_from_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; name a \.yaml file in it"):
        load_recipe(str(tmp_path))
    (tmp_path / "a.yaml").write_text("extends:\n")
    with pytest.raises(InputError, match=r"a\.yaml: extends is None; it must be the name of a recipe"):
        load_recipe(str(tmp_path / "a.yaml"))
