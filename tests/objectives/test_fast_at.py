"""Fast-AT: one long step from a random start, back into the ball."""

import pytest
import torch

from as_found import same
from objective_checks import UNDER_CLAT, X_ADV, X, Y, assert_formula, assert_resumes, assert_trains, on_logits
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.objectives import METHODS, FastAT
from toughen.types import Batch, ThreatModel
from zoo import build

LINF = ThreatModel(eps=0.1)
MANY = PGD(LINF, step_size=0.01, steps=40, model_mode="unchanged")


def perturbed(attack=MANY, *, seed=0, batch=None, **settings):
    draw = torch.Generator().manual_seed(seed)
    return FastAT(**settings).perturb(build("nested"), batch or Batch(X, Y), attack, generator=draw).x_adv


def by_hand(step, start):
    """The published update, written out: gradient of the mean loss in train mode at x + delta_0."""
    model = build("nested")
    delta = start.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(model(X + delta), Y).backward()
    moved = (delta.detach() + step * delta.grad.sign()).clamp(-0.1, 0.1)
    return (X + moved).clamp(0, 1)


def uniform(seed=0):
    draw = torch.Generator().manual_seed(seed)
    start = 0.1 * torch.empty_like(X).uniform_(-1, 1, generator=draw)
    return (X + start).clamp(0, 1) - X


def test_loss_and_gradient_are_those_of_the_formula():
    assert_formula(FastAT(), lambda clean, perturbed, y: -perturbed.log_softmax(dim=1)[range(len(y)), y].mean())


def test_the_perturbation_is_the_published_one():
    torch.testing.assert_close(perturbed(), by_hand(0.125, uniform()))


def test_a_long_step_from_zero_is_fgsm():
    torch.testing.assert_close(perturbed(start="zero", step=7.0), by_hand(0.1, torch.zeros_like(X)))


def test_without_a_step_it_trains_on_uniform_noise():
    torch.testing.assert_close(perturbed(step=0.0), X + uniform())


def test_it_starts_where_the_batch_says():
    start = X + 0.5 * uniform(seed=3)
    torch.testing.assert_close(perturbed(batch=Batch(X, Y, start=start)), by_hand(0.125, start - X))


def test_the_mode_is_that_of_the_run_s_attack():
    assert not same(perturbed(PGD(LINF, step_size=0.01, model_mode="eval")), perturbed())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_is_respected(norm):
    delta = perturbed(PGD(ThreatModel(norm=norm, eps=0.3), step_size=0.1)) - X
    length = delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert float(length.max()) <= 0.3 + 1e-6
    assert float(length.min()) > 0.1


@UNDER_CLAT
def test_it_trains_and_its_state_continues(clat):
    assert_trains(FastAT(), *clat)
    assert_resumes(FastAT(), *clat)


def test_it_is_registered_under_the_name_of_its_row():
    assert METHODS["fast-at"] is FastAT
    assert FastAT.label == "Fast-AT"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": -1.0}, r"fast-at step is -1\.0; it must be a finite multiple of eps >= 0"),
        ({"start": "previous"}, r"unknown fast-at start 'previous'.*uniform, zero"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FastAT(**settings)


def test_the_clean_images_do_not_enter_the_loss():
    clean = X_ADV.flatten(1)[:, :4].clone().requires_grad_(True)
    other = X.flatten(1)[:, :4].clone().requires_grad_(True)
    gradient, none = torch.autograd.grad(
        on_logits(FastAT(), clean, other, Y % 4).loss, (other, clean), allow_unused=True
    )
    assert gradient.any()
    assert none is None
