"""TRADES: its loss and gradient by hand, its start, its reductions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from as_found import left_as_found
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
    gradients,
    on_logits,
    random_logits,
)
from toughen.attacks import PGD, KLToClean, gaussian_start
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.objectives import METHODS, TRADES, CleanCE
from toughen.types import AdversarialBatch, Batch, ThreatModel
from zoo import build


def divergence(clean, perturbed):
    """sum_k p_k log(p_k / q_k) of each image, from probabilities."""
    p, q = (z.exp() / z.exp().sum(dim=1, keepdim=True) for z in (clean, perturbed))
    return (p * (p / q).log()).sum(dim=1)


def trades(beta, smoothing=0.0):
    def formula(clean, perturbed, y):
        p = clean.exp() / clean.exp().sum(dim=1, keepdim=True)
        labelled = [i for i in range(len(y)) if y[i] >= 0]
        q = torch.full_like(p, smoothing / p.shape[1])
        for i in labelled:
            q[i, y[i]] += 1 - smoothing
        ce = -sum((q[i] * p[i].log()).sum() for i in labelled) / len(labelled)
        return ce + beta * divergence(clean, perturbed).sum() / len(y)

    return formula


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_formula(smoothing, y):
    assert_formula(TRADES(beta=2.5, label_smoothing=smoothing), trades(2.5, smoothing), y)


def test_a_detached_target_changes_the_gradient_and_not_the_value():
    (keep, kept), (detach, detached) = found(TRADES()), found(TRADES(target_grad="detach"))
    assert torch.equal(keep.loss, detach.loss)
    assert not torch.allclose(kept[0], detached[0], rtol=1e-2)
    assert_formula(
        TRADES(target_grad="detach"),
        lambda clean, perturbed, y: F.cross_entropy(clean, y) + 6 * divergence(clean.detach(), perturbed).mean(),
    )


def test_with_beta_zero_it_is_clean_training_exactly():
    (trades_, gradient), (clean, expected) = found(TRADES(beta=0.0)), found(CleanCE())
    assert torch.equal(trades_.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


def test_with_nothing_perturbed_the_divergence_and_its_gradient_are_zero():
    (output, gradient), (clean, expected) = found(TRADES(), x_adv=X), found(CleanCE())
    assert output.terms["kl"] == 0
    assert torch.equal(output.loss, clean.loss)
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_the_divergence_is_positive_and_not_symmetric(seed, num_classes):
    clean, perturbed, y = random_logits(1, num_classes, seed)
    there, back = (on_logits(TRADES(), *pair, y).terms["kl"] for pair in ((clean, perturbed), (perturbed, clean)))
    assert min(there, back) > 0
    if num_classes > 2:
        assert there != back


@pytest.mark.parametrize("num_classes", [2, 4])
def test_one_image_is_a_batch_and_twice_the_batch_is_the_same_loss(num_classes):
    clean, perturbed, y = random_logits(1, num_classes)
    one = on_logits(TRADES(), clean, perturbed, y).loss
    torch.testing.assert_close(one, trades(6.0)(clean, perturbed, y))
    torch.testing.assert_close(on_logits(TRADES(), clean.repeat(2, 1), perturbed.repeat(2, 1), y.repeat(2)).loss, one)


def test_a_batch_without_any_label_has_the_divergence_alone():
    clean, perturbed, _ = random_logits(3)
    loss = on_logits(TRADES(beta=2.0), clean, perturbed, torch.full((3,), -1)).loss
    torch.testing.assert_close(loss, 2 * divergence(clean, perturbed).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_full_precision(dtype):
    logits = [torch.tensor([[0.0, 50.0, -50.0], [1.0, 1.25, 1.5]], dtype=dtype), torch.ones(2, 3, dtype=dtype)]
    y = torch.tensor([2, 0])
    clean, perturbed = (z.requires_grad_(True) for z in logits)
    loss = on_logits(TRADES(), clean, perturbed, y).loss
    torch.testing.assert_close(loss, trades(6.0)(clean.double(), perturbed.double(), y).float())
    loss.backward()
    assert clean.grad.isfinite().all()


def test_a_step_has_one_forward_of_each_kind_of_images():
    model, seen = build("nested"), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    TRADES().loss(ModelView(model), AdversarialBatch(Batch(X, Y), X_ADV))
    assert [id(images) for images in seen] == [id(X), id(X_ADV)]


# -- the inner maximisation -----------------------------------------------------------------------


def test_the_search_begins_at_a_little_noise_unless_the_batch_or_the_attack_says_where():
    noise = gaussian_start(X, torch.Generator().manual_seed(3))
    asked = asked_of_attack(TRADES(), Batch(X, Y), torch.Generator().manual_seed(3))
    assert isinstance(asked["goal"], KLToClean)
    assert torch.equal(asked["start"], noise)
    assert 0 < (asked["start"] - X).std() < 0.002
    assert asked_of_attack(TRADES(start="attack"), Batch(X, Y))["start"] is None
    for objective in (TRADES(), TRADES(start="attack")):
        assert asked_of_attack(objective, Batch(X, Y, start=X_ADV))["start"] is X_ADV


def test_the_perturbation_is_inside_the_ball_raises_the_divergence_and_leaves_the_model_as_found():
    model = build("normed")
    live = TRADES().bind(model, attack=PGD2)
    with left_as_found(model):
        x_adv = live.perturb(Batch(X, Y), generator=torch.Generator()).x_adv
    assert (x_adv - X).abs().max() <= 0.1 + 1e-6
    goal = KLToClean().bind(ModelView(model.eval()), X, Y)
    with torch.no_grad():
        assert (goal(x_adv) > goal(gaussian_start(X, torch.Generator()))).all()


def test_with_eps_zero_it_is_clean_training():
    still = PGD(ThreatModel(eps=0.0), step_size=0.05, steps=2)
    models = [build("nested"), build("nested")]
    losses = [method.bind(m, attack=still)(X, Y).loss for method, m in zip((TRADES(), CleanCE()), models, strict=True)]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(gradients(m, loss) for m, loss in zip(models, losses, strict=True)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_an_attack_that_would_begin_where_there_is_no_gradient_is_refused():
    still = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2, random_start=False)
    TRADES().bind(build("nested"), attack=still)
    with pytest.raises(InputError, match=r"trades start='attack' with .* random_start=False never moves an image"):
        TRADES(start="attack").bind(build("nested"), attack=still)


# -- as a method ----------------------------------------------------------------------------------


def test_its_label_says_what_is_smoothed():
    assert TRADES().label == "TRADES"
    assert TRADES(label_smoothing=0.1).label == "TRADES (label smoothing 0.1)"
    assert METHODS["trades"] is TRADES
    assert TRADES.reads_unlabelled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, r"trades beta is -1\.0; it must be a finite number >= 0"),
        ({"beta": float("nan")}, "trades beta is nan"),
        ({"label_smoothing": 1.0}, r"trades label_smoothing is 1\.0; it must be at least 0 and below 1"),
        ({"start": "gauss"}, "unknown trades start 'gauss'; did you mean 'gaussian'"),
        ({"target_grad": "stop"}, "unknown trades target_grad 'stop'.*keep, detach|detach, keep"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TRADES(**settings)


@UNDER_CLAT
def test_it_trains_alone_and_under_clat_and_resumes(clat):
    assert_trains(TRADES(), *clat)
    assert_resumes(TRADES(), *clat)
