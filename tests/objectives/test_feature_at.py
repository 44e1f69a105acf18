"""The activation attack in the training loop."""

import pytest
import torch

from as_found import same
from objective_checks import UNDER_CLAT, X, Y, asked_of_attack, assert_formula, assert_resumes, assert_trains
from toughen.attacks import PGD, FeatureMatch, FeatureShift
from toughen.errors import InputError
from toughen.objectives import METHODS, FeatureAT
from toughen.objectives.feature_at import other_label
from toughen.types import Batch, ThreatModel
from zoo import build

LAYERS = ("first", "third")


def test_loss_and_gradient_are_those_of_the_formula():
    def formula(clean, perturbed, y):
        return -perturbed.log_softmax(dim=1)[range(len(y)), y].mean()

    assert_formula(FeatureAT(layers=LAYERS), formula)


def test_the_attack_is_asked_to_match_another_image_or_to_leave_its_own():
    draw = torch.Generator().manual_seed(0)
    goal = asked_of_attack(FeatureAT(layers=LAYERS, norm="rms"), Batch(X, Y, start=X), draw)["goal"]
    assert isinstance(goal, FeatureMatch)
    assert (goal.layers, goal.norm) == (LAYERS, "rms")
    assert same(goal.x_target, X[other_label(Y, torch.Generator().manual_seed(0))])
    asked = asked_of_attack(FeatureAT(layers=LAYERS, target="none"), Batch(X, Y, start=X))
    assert asked["goal"] == FeatureShift(layers=LAYERS)
    assert same(asked["start"], X)


@pytest.mark.parametrize("seed", range(20))
def test_a_partner_has_another_label_where_there_is_one_and_is_never_the_image_itself(seed):
    draw = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 0, 1, 2, 2, 2])
    partner = other_label(y, draw)
    assert (y[partner] != y).all()
    alike = other_label(torch.zeros(5, dtype=torch.long), draw)
    assert (alike != torch.arange(5)).all()


def test_every_possible_partner_is_drawn():
    y = torch.tensor([0, 1, 1, 2])
    draw = torch.Generator().manual_seed(0)
    assert {int(other_label(y, draw)[0]) for _ in range(50)} == {1, 2, 3}


def test_a_single_image_is_its_own_partner():
    assert other_label(torch.tensor([3]), torch.Generator()).tolist() == [0]


@pytest.mark.parametrize("target", ["other", "none"])
@UNDER_CLAT
def test_it_trains_and_its_state_continues(clat, target):
    objective = FeatureAT(layers=("second",), target=target)
    assert_trains(objective, *clat)
    assert_resumes(objective, *clat)


def test_it_is_registered_with_its_label():
    assert METHODS["feature-at"] is FeatureAT
    assert FeatureAT.label == "Feature-AT"


def test_an_unknown_layer_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown layer 'secnod'; did you mean 'second'"):
        FeatureAT(layers=("secnod",)).bind(build("backwards"), attack=PGD(ThreatModel(eps=0.1), step_size=0.1))


def test_an_attack_that_could_not_move_is_refused():
    attack = PGD(ThreatModel(eps=0.1), step_size=0.1, random_start=False)
    with pytest.raises(InputError, match=r"target='none' with the attack's random_start=False never moves an image"):
        FeatureAT(layers=LAYERS, target="none").bind(build("backwards"), attack=attack)


def test_no_layer_is_refused():
    with pytest.raises(InputError, match=r"feature-at layers is empty; name at least one"):
        FeatureAT(layers=())


def test_a_name_in_the_place_of_names_is_refused():
    with pytest.raises(InputError, match=r"feature-at layers is 'first'; give a tuple of names, here \('first',\)"):
        FeatureAT(layers="first")
