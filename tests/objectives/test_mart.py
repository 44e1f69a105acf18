"""MART: its loss and gradient by hand, the class that it penalises, its reductions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objective_checks import (
    MISSING,
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
from toughen.attacks import CrossEntropy, gaussian_start
from toughen.errors import InputError
from toughen.objectives import MART, METHODS
from toughen.types import Batch


def mart(beta):
    """The loss, image by image and class by class."""

    def formula(clean, perturbed, y):
        p, q = (z.exp() / z.exp().sum(dim=1, keepdim=True) for z in (clean, perturbed))
        losses = []
        for i in range(len(y)):
            if y[i] < 0:
                continue
            strongest = max((k for k in range(p.shape[1]) if k != y[i]), key=q[i].tolist().__getitem__)
            bce = -q[i, y[i]].log() - (1.0001 - q[i, strongest] + 1e-12).log()
            divergence = (p[i] * (p[i] / q[i]).log()).sum()
            losses.append(bce + beta * divergence * (1.0000001 - p[i, y[i]]))
        return sum(losses) / len(losses)

    return formula


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
def test_loss_and_gradient_are_those_of_the_formula(y):
    assert_formula(MART(), mart(5.0), y)
    assert_formula(MART(beta=0.7), mart(0.7), y)


def test_with_beta_zero_the_clean_images_do_not_matter():
    clean, perturbed, y = random_logits(4)
    clean.requires_grad_(True)
    output = on_logits(MART(beta=0.0), clean, perturbed, y)
    assert torch.equal(output.loss, output.terms["bce"])
    (gradient,) = torch.autograd.grad(output.loss, clean)
    assert torch.equal(gradient, torch.zeros_like(clean))


def test_with_nothing_perturbed_the_loss_is_the_boosted_cross_entropy():
    output, _ = found(MART(), x_adv=X)
    assert torch.equal(output.loss, output.terms["bce"])
    assert output.terms["weighted_kl"] == 0


def test_an_image_that_is_right_with_certainty_has_no_divergence():
    clean, perturbed = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    right, wrong = (on_logits(MART(), clean, perturbed, torch.tensor([y])).terms["weighted_kl"] for y in (0, 1))
    assert 0 <= right < 1e-6
    assert wrong > 3


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_the_penalised_class_is_the_strongest_but_never_the_true_one(seed, num_classes):
    clean, perturbed, y = random_logits(1, num_classes, seed)
    perturbed.requires_grad_(True)
    p = perturbed.softmax(dim=1)
    others = [k for k in range(num_classes) if k != y]
    penalty = on_logits(MART(beta=0.0), clean, perturbed, y).loss + p[0, y[0]].log()
    expected = -torch.log(1.0001 - max(p[0, k] for k in others) + 1e-12)
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_one_image_is_a_batch(num_classes):
    clean, perturbed, y = random_logits(1, num_classes)
    torch.testing.assert_close(on_logits(MART(), clean, perturbed, y).loss, mart(5.0)(clean, perturbed, y))


def test_certainty_of_the_wrong_class_is_bounded_and_keeps_its_gradient():
    clean, perturbed = torch.zeros(1, 2), torch.tensor([[0.0, 60.0]], requires_grad=True)
    output = on_logits(MART(beta=0.0), clean, perturbed, torch.tensor([0]))
    assert float(output.loss.detach()) == pytest.approx(60 - math.log(1e-4), rel=1e-3)
    (gradient,) = torch.autograd.grad(on_logits(MART(), clean, perturbed, torch.tensor([0])).loss, perturbed)
    assert gradient.isfinite().all()
    assert (gradient[0, 0] < -0.5).all()


def test_half_precision_logits_are_compared_in_full_precision():
    clean, perturbed, y = random_logits(4)
    halves = [z.bfloat16() for z in (clean, perturbed)]
    loss = on_logits(MART(), *halves, y).loss
    torch.testing.assert_close(loss, mart(5.0)(*(z.double() for z in halves), y).float())


def test_a_batch_without_any_label_has_loss_zero_and_a_finite_gradient():
    output, gradient = found(MART(), torch.full_like(Y, -1))
    assert output.loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient)


def test_the_search_is_for_cross_entropy_from_a_little_noise():
    noise = gaussian_start(X, torch.Generator().manual_seed(3))
    asked = asked_of_attack(MART(), Batch(X, Y), torch.Generator().manual_seed(3))
    assert isinstance(asked["goal"], CrossEntropy)
    assert torch.equal(asked["start"], noise)
    assert asked_of_attack(MART(start="attack"), Batch(X, Y))["start"] is None
    assert asked_of_attack(MART(), Batch(X, Y, start=X_ADV))["start"] is X_ADV


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.5}, r"mart beta is -0\.5; it must be a finite number >= 0"),
        ({"start": "uniform"}, "unknown mart start 'uniform'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MART(**settings)


def test_it_is_a_method_that_needs_labels():
    assert METHODS["mart"] is MART
    assert MART().label == "MART"
    assert not MART.reads_unlabelled


@UNDER_CLAT
def test_it_trains_alone_and_under_clat_and_resumes(clat):
    assert_trains(MART(), *clat)
    assert_resumes(MART(), *clat)
