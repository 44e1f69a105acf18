"""CLAT's settings: what is refused and in which words, and what they are called."""

import math
from dataclasses import asdict, dataclass

import pytest

from toughen.attacks import PGD
from toughen.criticality.selection import SELECTORS, Bottom, Fixed
from toughen.errors import InputError
from toughen.methods import CLAT, CLATPaper, stack
from toughen.objectives import METHODS, PGDAT, CleanCE
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(4)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "clat k is 0; at least 1 layer must train"),
        ({"lam": -1.0}, r"clat lam is -1\.0; it must be a number >= 0, or 'auto'"),
        ({"lam": math.nan}, "clat lam is nan"),
        ({"lam": math.inf}, "clat lam is inf"),
        ({"lam": "car"}, "clat lam is 'car'; it must be a number >= 0, or 'auto'"),
        ({"rho": -0.5}, r"clat rho is -0\.5"),
        ({"lr_scale": -1.0}, r"lr_scale -1\.0; both must be >= 0"),
        ({"start_epoch": -1}, "clat start_epoch is -1"),
        ({"every": 0}, r"every 0, .* >= 1 \(or null for a single selection\)"),
        ({"probe_size": 0}, "probe_size 0"),
        ({"select": "fixed"}, "clat layers and select='fixed' go together"),
        ({"layers": ("a",)}, "clat layers and select='fixed' go together"),
        ({"select": "bottm"}, "unknown selection rule 'bottm'; did you mean 'bottom'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CLAT(**settings)


def test_labels_are_the_papers_row_labels():
    assert CLAT().label == "CLAT"
    assert CLAT(inner_max="fgsm-rs").label == "CLAT (fast)"
    assert stack(PGDAT(), CLAT(k=3)).label == "PGD-AT + CLAT"
    assert stack(PGDAT(), CLAT(inner_max="fgsm-rs", start_epoch=50)).label == "PGD-AT + CLAT (fast)"
    assert stack(CleanCE(), CLAT()).label == "clean + CLAT"
    assert stack(CLAT()).label == "CLAT"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "the method list is empty; start it with an objective, for example pgd-at"),
        ((PGDAT(), CleanCE()), "clean is an objective and must come first; PGD-AT stands there"),
        ((CLAT(), PGDAT()), "PGD-AT is an objective and must come first; CLAT stands there"),
        ((PGDAT(), CLAT(k=1), CLAT(k=2)), "CLAT stands twice in the stack; name it once"),
        ((PGDAT(), CLAT(k=1), CLATPaper(lam=0.1)), "CLAT stands twice in the stack; name it once"),
        ((CLAT(start_epoch=5),), "CLAT stands alone but nothing would train before start_epoch=5"),
        ((CLAT(base="inner"),), r"CLAT \(inner loss\) stands alone but base='inner' has no inner loss"),
    ],
)
def test_impossible_stacks_are_refused(methods, message):
    with pytest.raises(InputError, match=message):
        stack(*methods)


@pytest.mark.parametrize("settings", [{"start_epoch": 5}, {"base": "inner"}])
def test_binding_alone_what_needs_an_inner_method_is_refused(settings):
    with pytest.raises(InputError, match=r"use stack\(PGDAT\(\), CLAT\(\.\.\.\)\)"):
        CLAT(**settings).bind(build("backwards"), attack=PGD2)


def test_training_before_the_first_selection_is_refused():
    live = CLAT().bind(build("backwards"), attack=PGD2)
    with pytest.raises(InputError, match=r"call epoch_start\(epoch, probe\) before the first batch"):
        live(X, Y)


def test_a_selection_without_images_is_refused():
    with pytest.raises(InputError, match="CLAT has to select layers but the probe is empty"):
        CLAT().bind(build("backwards"), attack=PGD2).epoch_start(0)


def test_a_selection_without_a_perturbation_is_refused():
    still = PGD(ThreatModel(eps=0.0), step_size=0.05, steps=1)
    with pytest.raises(InputError, match="the perturbed images equal the clean ones"):
        CLAT().bind(build("backwards"), attack=still).epoch_start(0, [(X, Y)])


def test_too_large_a_k_is_refused_before_training_and_at_the_selection():
    live = CLAT(k=4).bind(build("backwards"), attack=PGD2)
    with pytest.raises(InputError, match="clat k is 4; Backwards has 3 layers to choose from, so k must be 1 to 3"):
        live.check(X[:1])
    with pytest.raises(InputError, match="k is 4; this model has 3 layers to choose from"):
        live.epoch_start(0, [(X, Y)])
    CLAT(k=4, classifier="include").bind(build("backwards"), attack=PGD2).check(X[:1])


@pytest.mark.parametrize("settings", [{"select": "fixed", "layers": ("sekond",)}, {"select": Fixed(("sekond",))}])
def test_an_unknown_fixed_layer_is_refused_before_training(settings):
    with pytest.raises(InputError, match="unknown layer 'sekond'; did you mean 'second'"):
        CLAT(**settings).bind(build("backwards"), attack=PGD2).check(X[:1])


def test_the_paper_preset_is_eq_6_with_batch_norm_in_train_mode():
    assert asdict(CLATPaper(lam=0.3, k=2)) == asdict(CLAT(lam=0.3, k=2, norm_stats="update"))
    assert METHODS["clat"] is CLAT


def test_a_rule_given_as_an_object_is_the_same_setting_as_its_name():
    assert CLAT(select=Fixed(("a", "b"))) == CLAT(select="fixed", layers=("a", "b"))
    assert CLAT(select=Bottom()) == CLAT(select="bottom")


def test_k_must_agree_with_the_named_layers():
    with pytest.raises(InputError, match="clat k is 3 but 2 layers are named"):
        CLAT(k=3, select="fixed", layers=("a", "b"))


@pytest.mark.parametrize(("setting", "near"), [("base", "inner"), ("forward", "full"), ("norm_stats", "follow")])
def test_a_misspelt_choice_is_refused_in_python_too(setting, near):
    with pytest.raises(InputError, match=f"unknown clat {setting} '{near}x'; did you mean '{near}'"):
        CLAT(**{setting: f"{near}x"})


def test_a_rule_with_settings_of_its_own_keeps_them(monkeypatch):
    @dataclass(frozen=True)
    class Skipping:
        skip: int

        def __call__(self, report, k, *, classifier, generator):
            return tuple(row.name for row in report.ranked()[self.skip : self.skip + k])

    monkeypatch.setitem(SELECTORS._entries, "skipping", Skipping)
    assert CLAT(select=Skipping(skip=3)).select == Skipping(skip=3)
