"""Beliefs and their distances, and the attack goals made of them."""

import pytest
import torch
import torch.nn.functional as F

from toughen.attacks import PGD, KLToClean, LeastLikely, ProbabilityShift, SquaredError
from toughen.attacks.probabilities import at_least_float32, kl_divergence, log_probabilities, probabilities
from toughen.layers import ModelView
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(5)
X_ADV = X + 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(9))


def score(goal, model, y=Y, x_adv=X_ADV):
    with torch.no_grad():
        return goal.bind(ModelView(model), X, y)(x_adv)


@pytest.mark.parametrize(
    ("given", "used"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_precision_is_raised_to_float32_and_never_lowered(given, used):
    logits = torch.zeros(2, 3, dtype=given)
    assert at_least_float32(logits).dtype == used
    assert probabilities(logits).dtype == used
    assert log_probabilities(logits).dtype == used


def test_certain_beliefs_have_a_finite_divergence_and_gradient():
    logits = torch.tensor([[500.0, 0.0]], requires_grad=True)
    divergence = kl_divergence(log_probabilities(logits), log_probabilities(torch.tensor([[0.0, 500.0]])))
    assert divergence.item() == 500
    divergence.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_squared_error_is_that_to_the_label_and_zero_without_one():
    model = build("nested").eval()
    y = torch.tensor([0, 1, -1, 2, 3])
    expected = (model(X_ADV).softmax(dim=1) - F.one_hot(y.clamp(min=0), 4)).square().sum(dim=1).detach()
    expected[2] = 0
    torch.testing.assert_close(score(SquaredError(), model, y), expected)


def test_the_probability_shift_is_the_squared_distance_of_beliefs_and_needs_no_label():
    model = build("nested").eval()
    expected = (model(X_ADV).softmax(dim=1) - model(X).softmax(dim=1)).square().sum(dim=1).detach()
    torch.testing.assert_close(score(ProbabilityShift(), model, torch.full_like(Y, -1)), expected)
    assert torch.equal(score(ProbabilityShift(), model, x_adv=X), torch.zeros(5))


def test_the_clean_images_are_looked_at_once():
    for goal in (KLToClean(), ProbabilityShift(), LeastLikely()):
        model, calls = build("nested").eval(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        PGD(ThreatModel(eps=0.1), step_size=0.05, steps=3)(model, X, Y, goal=goal)
        assert len(calls) == 1 + 3


def test_the_goal_for_the_least_likely_class_is_its_log_probability():
    model = build("nested").eval()
    target = model(X).argmin(dim=1, keepdim=True)
    expected = model(X_ADV).log_softmax(dim=1).gather(1, target).squeeze(1).detach()
    torch.testing.assert_close(score(LeastLikely(), model), expected)


def test_an_attack_on_the_least_likely_class_makes_it_likelier():
    model = build("nested").eval()
    x_adv = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=3)(model, X, Y, goal=LeastLikely())
    target = model(X).argmin(dim=1, keepdim=True)
    before, after = (model(x).softmax(dim=1).gather(1, target) for x in (X, x_adv))
    assert (after > before).all()
