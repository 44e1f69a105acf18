"""GradAlign: its regulariser by hand, its reductions, and networks of the package under a second derivative."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from as_found import same
from objective_checks import MISSING, UNDER_CLAT, X_ADV, X, Y, assert_resumes, assert_trains, sharp
from toughen import models
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.objectives import METHODS, FastAT, GradAlign
from toughen.objectives.grad_align import one_minus_cosine
from toughen.types import AdversarialBatch, Batch, ThreatModel

ATTACK = PGD(ThreatModel(eps=0.1), step_size=0.02, steps=20)


def bent(seed=0):
    """A smooth network without batch norm, so that the gradient of an image is its own, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 8), nn.Tanh(), nn.Linear(8, 4))
    return model.double()


def found(model, *, lam=0.2, y=Y, second=X_ADV):
    adv = AdversarialBatch(Batch(X.double(), y), X.double() + 0.05, second=second.double())
    return GradAlign(lam=lam).loss(ModelView(model), adv)


def reference(model, y=Y, second=X_ADV):
    """1 - cos, image by image; the first gradient is a constant."""
    terms = []
    for i in range(len(y)):
        if y[i] < 0:
            continue
        a, b = (image[i : i + 1].double().requires_grad_(True) for image in (X, second))
        (g1,) = torch.autograd.grad(F.cross_entropy(model(a), y[i : i + 1]), a)
        (g2,) = torch.autograd.grad(F.cross_entropy(model(b), y[i : i + 1]), b, create_graph=True)
        g1 = g1.detach()
        terms.append(1 - (g1 * g2).sum() / (g1.norm() * g2.norm()))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("y", [Y, MISSING], ids=["labelled", "partly labelled"])
def test_loss_and_gradient_are_those_of_the_formula(y):
    model = bent()
    output = found(model, lam=0.7, y=y)
    ce = F.cross_entropy(model(X.double() + 0.05), y, ignore_index=-1)
    expected = ce + 0.7 * reference(model, y)
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = (
        torch.autograd.grad(v, list(model.parameters()), allow_unused=True) for v in (output.loss, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert 0 < float(output.terms["misalignment"]) <= 2


def test_gradients_of_a_linear_model_agree_everywhere():
    # of two classes: with more, the softmax weighs their directions differently from place to place
    model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 2)).double()
    assert float(found(model, y=Y % 2).terms["misalignment"]) == pytest.approx(0, abs=1e-12)


def test_without_a_random_point_the_gradients_agree():
    assert float(found(bent(), second=X).terms["misalignment"].detach()) == pytest.approx(0, abs=1e-12)


def test_an_image_without_gradient_is_left_out_and_harms_nobody():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bent()

        def forward(self, x):
            hears = torch.arange(len(x)) > 0
            return self.net(torch.where(hears[:, None, None, None], x, x.detach()))

    model = Deaf()
    output = found(model)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    whole = reference(model.net) * len(Y)
    first = reference(model.net, torch.where(torch.arange(len(Y)) == 0, Y, -1))
    torch.testing.assert_close(output.terms["misalignment"], ((whole - first) / (len(Y) - 1)).detach())


@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-26, 1e-40])
def test_gradients_of_a_network_that_is_sure_of_everything_do_no_harm(size):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 20, generator=draw) for _ in range(2))
    a[0], b[0] = size * a[0], size * b[0]
    b.requires_grad_(True)
    value = one_minus_cosine(a, b)
    (gradient,) = torch.autograd.grad(value, b)
    assert gradient.isfinite().all()
    counted = (v.detach()[0 if size > 1e-19 else 1 :].double() for v in (a, b))
    expected = (1 - F.cosine_similarity(*counted, dim=1, eps=0)).mean()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_without_any_gradient_the_regulariser_is_zero():
    assert float(found(bent(), y=torch.full_like(Y, -1)).terms["misalignment"]) == 0


def test_lam_zero_is_fgsm_training_and_runs_no_further_pass():
    batch, draw = Batch(X, Y), torch.Generator().manual_seed(0)
    model = sharp().float()
    ours = GradAlign(lam=0.0).perturb(model, batch, ATTACK, generator=draw)
    fgsm = FastAT(start="zero", step=1.0).perturb(model, batch, ATTACK, generator=torch.Generator())
    assert same(ours.x_adv, fgsm.x_adv)
    passes = []
    with_hook = model.register_forward_hook(lambda *_: passes.append(1))
    loss = GradAlign(lam=0.0).loss(ModelView(model), ours).loss
    with_hook.remove()
    assert len(passes) == 1
    assert same(loss, FastAT().loss(ModelView(model), fgsm).loss)


def test_the_random_point_is_uniform_in_the_ball_and_drawn_from_the_generator():
    points = [
        GradAlign().perturb(sharp().float(), Batch(X, Y), ATTACK, generator=torch.Generator().manual_seed(seed)).second
        for seed in (0, 0, 1)
    ]
    assert same(points[0], points[1])
    assert not same(points[0], points[2])
    eta = (points[0] - X) / 0.1
    assert float(eta.abs().max()) <= 1 + 1e-5
    assert float(eta.std()) == pytest.approx(1 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "wrn28_10", "densenet121", "vgg19"])
def test_the_networks_of_the_package_can_be_differentiated_twice(name):
    model = models.create(name, num_classes=4, width=2, seed=0).train()
    x = torch.rand(2, 3, 32, 32)
    adv = AdversarialBatch(Batch(x, torch.tensor([0, 1])), x, second=x + 0.01)
    GradAlign(lam=1.0).loss(ModelView(model), adv).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@UNDER_CLAT
def test_it_trains_and_its_state_continues(clat):
    assert_trains(GradAlign(), *clat)
    assert_resumes(GradAlign(), *clat)


def test_it_is_registered_under_the_name_of_its_row():
    assert METHODS["gradalign"] is GradAlign
    assert GradAlign.label == "GradAlign"


@pytest.mark.parametrize("name", ["lam", "step"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=rf"gradalign {name} is -1; it must be a finite number >= 0"):
        GradAlign(**{name: -1})
