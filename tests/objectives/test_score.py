"""SCORE: its two objectives by hand, what their bounds let pass, their reductions."""

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
from toughen.attacks import PGD, ProbabilityShift, SquaredError, gaussian_start
from toughen.errors import InputError
from toughen.objectives import METHODS, PGDATLSE, TRADESLSE
from toughen.types import Batch, ThreatModel
from zoo import build


def softmax(logits):
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)


def errors(p, y):
    """||p - e_y||^2 of each image; 0 without a label."""
    return [sum((p[i, k] - float(k == y[i])) ** 2 for k in range(p.shape[1])) * float(y[i] >= 0) for i in range(len(y))]


def bound(c, num_classes):
    return c * c + c * c / (num_classes - 1)


def at(c):
    def formula(_, perturbed, y):
        found_errors, limit = errors(softmax(perturbed), y), bound(c, perturbed.shape[1])
        return sum(e for e in found_errors if e > limit) / sum(y >= 0) - limit * sum(
            float(e > limit) for e in found_errors
        ) / sum(y >= 0)

    return formula


def trades(beta, c, clip):
    def formula(clean, perturbed, y):
        p, q = softmax(clean), softmax(perturbed)
        shifts = (p - q).square().sum(dim=1)
        limit = bound(c, p.shape[1])
        each = [e + beta * max(s - clip, s * 0) for e, s in zip(errors(p, y), shifts, strict=True)]
        return sum(max(loss - limit, loss * 0) for loss in each) / len(y)

    return formula


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
@pytest.mark.parametrize("c", [0.4, 0.0])
def test_the_loss_and_gradient_of_pgd_at_lse_are_those_of_the_formula(c, y):
    assert_formula(PGDATLSE(c=c), at(c), y)


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
@pytest.mark.parametrize(("beta", "c", "clip"), [(6.0, 0.3, 0.0), (4.0, 0.0, 0.0), (4.0, 0.0, 0.01), (2.0, 0.5, 0.1)])
def test_the_loss_and_gradient_of_trades_lse_are_those_of_the_formula(beta, c, clip, y):
    assert_formula(TRADESLSE(beta=beta, c=c, clip=clip), trades(beta, c, clip), y)


def test_the_defaults_are_those_published_without_extra_data():
    assert PGDATLSE() == PGDATLSE(c=0.4)
    assert TRADESLSE() == TRADESLSE(beta=6.0, c=0.3, clip=0.0, start="gaussian")


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_without_bound_and_consistency_both_are_the_brier_score_between_0_and_2(seed, num_classes):
    clean, perturbed, y = random_logits(3, num_classes, seed)
    losses = [
        on_logits(TRADESLSE(beta=0.0, c=0.0), clean, perturbed, y).loss,
        on_logits(PGDATLSE(c=0.0), perturbed, clean, y).loss,
    ]
    brier = sum(errors(softmax(clean), y)) / 3
    for loss in losses:
        torch.testing.assert_close(loss, brier)
        assert 0 <= loss <= 2


@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_prediction_that_misses_the_label_by_c_is_where_the_loss_begins(num_classes):
    def loss(missing, objective):
        p = torch.full((1, num_classes), missing / (num_classes - 1), dtype=torch.float64)
        p[0, 1] = 1 - missing
        return float(on_logits(objective, p.log(), p.log(), torch.tensor([1])).loss)

    for objective in (PGDATLSE(c=0.4), TRADESLSE(c=0.4)):
        assert loss(0.39, objective) == 0
        assert loss(0.4, objective) == pytest.approx(0, abs=1e-12)
        assert loss(0.41, objective) == pytest.approx(bound(0.41, num_classes) - bound(0.4, num_classes))


def test_with_nothing_perturbed_the_consistency_term_is_zero():
    output, gradient = found(TRADESLSE(c=0.0), x_adv=X)
    plain, expected = found(TRADESLSE(c=0.0, beta=0.0), x_adv=X)
    assert output.terms["shift"] == 0
    assert torch.equal(output.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


def test_clipping_lets_small_shifts_pass():
    clean, perturbed, y = random_logits(5)
    shifts = (softmax(clean) - softmax(perturbed)).square().sum(dim=1)
    plain, clipped, all_clipped = (
        on_logits(TRADESLSE(c=0.0, clip=clip), clean, perturbed, y).loss for clip in (0.0, float(shifts.median()), 2.0)
    )
    assert plain > clipped > all_clipped
    assert torch.equal(all_clipped, on_logits(TRADESLSE(c=0.0, beta=0.0), clean, perturbed, y).loss)


def test_an_image_without_a_label_has_the_consistency_term_alone():
    clean, perturbed, _ = random_logits(3)
    y = torch.full((3,), -1)
    shifts = (softmax(clean) - softmax(perturbed)).square().sum(dim=1)
    torch.testing.assert_close(on_logits(TRADESLSE(c=0.0), clean, perturbed, y).loss, 6 * shifts.mean())
    assert on_logits(PGDATLSE(c=0.0), clean, perturbed, y).loss == 0


@pytest.mark.parametrize("objective", [PGDATLSE(c=0.1), TRADESLSE(c=0.1)], ids=lambda method: method.label)
def test_one_image_of_two_classes_and_half_precision_are_no_trouble(objective):
    clean, perturbed, _ = random_logits(1, 2)
    y = perturbed.argmin(dim=1)
    formula = at(0.1) if isinstance(objective, PGDATLSE) else trades(6.0, 0.1, 0.0)
    halves = [z.bfloat16() for z in (clean, perturbed)]
    expected = formula(*(z.double() for z in halves), y)
    assert expected > 0
    torch.testing.assert_close(on_logits(objective, *halves, y).loss, expected.float())


def test_pgd_at_lse_searches_for_the_squared_error_from_the_attacks_own_start():
    asked = asked_of_attack(PGDATLSE(), Batch(X, Y))
    assert isinstance(asked["goal"], SquaredError)
    assert asked["start"] is None
    assert asked_of_attack(PGDATLSE(), Batch(X, Y, start=X_ADV))["start"] is X_ADV


def test_trades_lse_searches_for_another_belief_from_a_little_noise():
    noise = gaussian_start(X, torch.Generator().manual_seed(3))
    asked = asked_of_attack(TRADESLSE(), Batch(X, Y), torch.Generator().manual_seed(3))
    assert isinstance(asked["goal"], ProbabilityShift)
    assert torch.equal(asked["start"], noise)
    assert asked_of_attack(TRADESLSE(start="attack"), Batch(X, Y))["start"] is None
    assert asked_of_attack(TRADESLSE(), Batch(X, Y, start=X_ADV))["start"] is X_ADV


def test_an_attack_that_would_begin_where_there_is_no_gradient_is_refused():
    still = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2, random_start=False)
    with pytest.raises(InputError, match=r"trades-lse start='attack' with .* random_start=False never moves an image"):
        TRADESLSE(start="attack").bind(build("nested"), attack=still)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PGDATLSE, {"c": 1.0}, r"pgd-at-lse c is 1\.0; it is a probability, at least 0 and below 1"),
        (TRADESLSE, {"c": -0.1}, r"trades-lse c is -0\.1"),
        (TRADESLSE, {"beta": float("inf")}, "trades-lse beta is inf"),
        (TRADESLSE, {"clip": 2.5}, r"trades-lse clip is 2\.5; it must be 0 to 2"),
        (TRADESLSE, {"start": "zero"}, "unknown trades-lse start 'zero'"),
    ],
)
def test_settings_out_of_range_are_refused(method, settings, message):
    with pytest.raises(InputError, match=message):
        method(**settings)


def test_labels_are_those_of_the_tables():
    assert (METHODS["pgd-at-lse"], METHODS["trades-lse"]) == (PGDATLSE, TRADESLSE)
    assert (PGDATLSE().label, TRADESLSE().label) == ("SCORE (PGD-AT-LSE)", "SCORE")
    assert (PGDATLSE.reads_unlabelled, TRADESLSE.reads_unlabelled) == (False, True)


@UNDER_CLAT
@pytest.mark.parametrize("objective", [PGDATLSE(), TRADESLSE()], ids=lambda method: method.label)
def test_both_train_alone_and_under_clat_and_resume(objective, clat):
    assert_trains(objective, *clat)
    assert_resumes(objective, *clat)
