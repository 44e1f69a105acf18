"""Adversarial logit pairing: its loss and gradient by hand, its attacks, its reductions."""

import pytest
import torch
import torch.nn.functional as F

from objective_checks import (
    MISSING,
    PGD2,
    UNDER_CLAT,
    X_ADV,
    X,
    Y,
    asked_of_attack,
    assert_formula,
    assert_resumes,
    assert_trains,
    found,
    on_logits,
    random_logits,
)
from toughen.attacks import CrossEntropy, LeastLikely
from toughen.errors import InputError
from toughen.objectives import ALP, METHODS
from toughen.types import Batch
from zoo import build


def alp(weight, per_class, smoothing=0.0):
    def formula(clean, perturbed, y):
        num_classes = clean.shape[1]
        labelled = [i for i in range(len(y)) if y[i] >= 0]
        loss = 0.0
        for i in labelled:
            for z in (clean[i], perturbed[i]):
                log_p = z - z.exp().sum().log()
                loss -= ((1 - smoothing) * log_p[y[i]] + smoothing * log_p.sum() / num_classes) / 2
            squares = sum((clean[i, k] - perturbed[i, k]) ** 2 for k in range(num_classes))
            loss += weight * squares / (num_classes if per_class else 1)
        return loss / len(labelled)

    return formula


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
@pytest.mark.parametrize("pairing", ["mean", "sum"])
def test_loss_and_gradient_are_those_of_the_formula(pairing, y):
    assert_formula(ALP(weight=0.3, pairing=pairing), alp(0.3, pairing == "mean"), y, together=True)


def test_labels_may_be_smoothed_in_both_halves():
    assert_formula(ALP(label_smoothing=0.1), alp(0.5, True, 0.1), together=True)


def test_without_pairing_it_is_training_on_clean_and_perturbed_images_in_equal_parts():
    clean, perturbed, y = random_logits(4)
    loss = on_logits(ALP(weight=0.0), clean, perturbed, y).loss
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat((clean, perturbed)), y.repeat(2)))


def test_with_nothing_perturbed_it_is_clean_cross_entropy():
    clean, _, y = random_logits(4)
    output = on_logits(ALP(), clean, clean, y)
    assert output.terms["pairing"] == 0
    torch.testing.assert_close(output.loss, F.cross_entropy(clean, y))


def test_both_forms_of_an_image_go_through_one_forward():
    seen = []
    model = build("nested").double()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ALP().bind(model, attack=PGD2)(X.double(), Y)
    *attack, step = seen
    assert [len(images) for images in attack] == [6, 6]
    assert torch.equal(step[:6], X.double())
    assert not torch.equal(step[6:], X.double())


@pytest.mark.parametrize("num_classes", [2, 4])
def test_one_image_and_half_precision_are_no_trouble(num_classes):
    clean, perturbed, y = random_logits(1, num_classes)
    halves = [z.bfloat16() for z in (clean, perturbed)]
    expected = alp(0.5, True)(*(z.double() for z in halves), y)
    torch.testing.assert_close(on_logits(ALP(), *halves, y).loss, expected.float())


def test_a_batch_without_any_label_has_loss_zero_and_a_finite_gradient():
    output, gradient = found(ALP(), torch.full_like(Y, -1))
    assert output.loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient)


def test_the_attack_goes_away_from_the_label_or_to_the_least_likely_class():
    away, towards = (
        asked_of_attack(ALP(target=target), Batch(X, Y, start=X_ADV)) for target in ("away", "least-likely")
    )
    assert isinstance(away["goal"], CrossEntropy)
    assert isinstance(towards["goal"], LeastLikely)
    assert away["start"] is towards["start"] is X_ADV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"alp weight is -1\.0; it must be a finite number >= 0"),
        ({"pairing": "l2"}, "unknown alp pairing 'l2'"),
        ({"target": "random"}, "unknown alp target 'random'"),
        ({"label_smoothing": -0.1}, r"alp label_smoothing is -0\.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ALP(**settings)


def test_it_is_a_method_that_needs_labels():
    assert METHODS["alp"] is ALP
    assert (ALP().label, ALP(label_smoothing=0.1).label) == ("ALP", "ALP (label smoothing 0.1)")
    assert not ALP.reads_unlabelled


@UNDER_CLAT
def test_it_trains_alone_and_under_clat_and_resumes(clat):
    assert_trains(ALP(), *clat)
    assert_resumes(ALP(), *clat)
