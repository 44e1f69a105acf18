"""Objectives: their losses by hand, and reductions between them."""

import pytest
import torch
import torch.nn.functional as F

from as_found import left_as_found
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.objectives import METHODS, PGDAT, CleanCE
from toughen.rng import generator
from toughen.types import Batch, ThreatModel
from zoo import ZOO, build, images

X, Y = images(6)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def identical(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_clean_training_is_the_cross_entropy_of_the_clean_images():
    model = build("nested")
    out = CleanCE().bind(model, attack=PGD2)(X, Y)
    assert torch.equal(out.loss, F.cross_entropy(build("nested")(X), Y))
    assert out.terms == {"clean_ce": out.loss.detach()}


def test_pgd_at_is_the_cross_entropy_of_the_attacked_images():
    model = build("nested")
    out = PGDAT().bind(model, attack=PGD2, seed=5)(X, Y)
    x_adv = PGD2(build("nested"), X, Y, generator=generator(5, "attack", 0))
    assert not torch.equal(x_adv, X)
    assert torch.equal(out.loss, F.cross_entropy(build("nested")(x_adv), Y))


@pytest.mark.parametrize("name", [n for n in ZOO if n != "dropouts"])
def test_pgd_at_with_eps_zero_is_clean_training(name):
    still = PGD(ThreatModel(eps=0.0), step_size=0.05, steps=2)
    a, b = build(name), build(name)
    found = [PGDAT().bind(a, attack=still)(X, Y).loss, CleanCE().bind(b, attack=PGD2)(X, Y).loss]
    assert torch.equal(*found)
    assert identical(gradients(a, found[0]), gradients(b, found[1]))


def test_perturbing_leaves_the_model_as_found_and_the_images_detached():
    model = build("normed")
    live = PGDAT().bind(model, attack=PGD2)
    with left_as_found(model):
        adv = live.perturb(Batch(X, Y), generator=torch.Generator())
    assert not adv.x_adv.requires_grad


def test_each_call_draws_another_start_and_the_seed_decides_all_of_them():
    def losses(seed):
        live = PGDAT().bind(build("backwards"), attack=PGD2, seed=seed)
        return [float(live(X, Y).loss.detach()) for _ in range(3)]

    assert len(set(losses(0))) == 3
    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_resumed_objective_continues_with_the_same_draws():
    live = PGDAT().bind(build("backwards"), attack=PGD2)
    live(X, Y)
    state = live.state_dict()
    expected = live(X, Y).loss
    fresh = PGDAT().bind(build("backwards"), attack=PGD2)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X, Y).loss, expected)


def test_objectives_train_all_layers_and_select_none():
    model = build("backwards")
    live = PGDAT().bind(model, attack=PGD2)
    assert live.epoch_start(0, [(X, Y)]) is None
    assert live.selected is None
    assert live.trainable() == list(model.parameters())


def test_objectives_are_registered_by_their_recipe_names():
    assert METHODS["clean"] is CleanCE
    assert METHODS["pgd-at"] is PGDAT


@pytest.mark.parametrize("objective", [CleanCE(), PGDAT()])
def test_images_without_a_label_add_nothing_to_loss_and_gradients(objective):
    labels = Y.clone()
    labels[[1, 4]] = -1
    labelled = labels >= 0
    model, alone = build("nested"), build("nested")
    still = PGD(ThreatModel(eps=0.0), step_size=0.05, steps=1)
    loss = objective.bind(model, attack=still)(X, labels).loss
    expected = F.cross_entropy(alone(X)[labelled], Y[labelled])
    assert torch.allclose(loss, expected)
    for found, wanted in zip(gradients(model, loss), gradients(alone, expected), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_a_batch_without_any_label_has_loss_zero_and_a_finite_gradient():
    model = build("nested")
    loss = PGDAT().bind(model, attack=PGD2)(X, torch.full_like(Y, -1)).loss
    assert loss.item() == 0.0
    assert all(value.isfinite().all() for value in gradients(model, loss))


# -- label smoothing ------------------------------------------------------------------------------


def smoothed(logits, y, smoothing):
    """-sum_k q_k log p_k over images with a label; q is the label, less ``smoothing`` that all classes share."""
    log_p = logits.double() - logits.double().exp().sum(dim=1, keepdim=True).log()
    losses = [
        -sum((smoothing / 4 + (1 - smoothing) * float(k == y[i])) * log_p[i, k] for k in range(4))
        for i in range(len(y))
        if y[i] >= 0
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
@pytest.mark.parametrize("missing", [(), (1, 4)], ids=["labelled", "partly labelled"])
def test_smoothed_labels_share_a_part_of_their_weight_among_all_classes(missing, smoothing):
    labels = Y.clone()
    labels[list(missing)] = -1
    model, alone = build("nested").double(), build("nested").double()
    still = PGD(ThreatModel(eps=0.0), step_size=0.05, steps=1)
    loss = PGDAT(label_smoothing=smoothing).bind(model, attack=still)(X.double(), labels).loss
    expected = smoothed(alone(X.double()), labels, smoothing)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(model, loss), gradients(alone, expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_smoothing_changes_the_loss_and_not_the_attack():
    plain, smooth = (PGDAT(label_smoothing=s).bind(build("nested"), attack=PGD2) for s in (0.0, 0.1))
    found = [live.perturb(Batch(X, Y), generator=torch.Generator()).x_adv for live in (plain, smooth)]
    assert torch.equal(*found)
    assert not torch.equal(plain(X, Y).loss, smooth(X, Y).loss)


def test_smoothing_leaves_a_batch_without_any_label_at_zero():
    model = build("nested")
    loss = PGDAT(label_smoothing=0.1).bind(model, attack=PGD2)(X, torch.full_like(Y, -1)).loss
    assert loss.item() == 0.0
    assert all(value.isfinite().all() for value in gradients(model, loss))


def test_the_row_label_says_what_is_smoothed():
    assert PGDAT().label == "PGD-AT"
    assert PGDAT(label_smoothing=0.1).label == "PGD-AT (label smoothing 0.1)"


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_all_or_less_than_nothing_away_is_refused(smoothing):
    with pytest.raises(InputError, match=f"pgd-at label_smoothing is {smoothing}; it must be at least 0 and below 1"):
        PGDAT(label_smoothing=smoothing)
