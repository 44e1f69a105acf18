"""The activation attack: features of another image as the goal, and momentum in the search."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from toughen.attacks import PGD, CrossEntropy, FeatureMatch
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(5)
TARGET = images(5, seed=1)[0]


def value(goal, x_adv, model):
    return goal.bind(ModelView(model), X, Y)(x_adv)


@pytest.mark.parametrize(
    ("norm", "measure"),
    [("l2", lambda shift: shift.norm(dim=1)), ("squared", lambda shift: shift.square().sum(dim=1))],
    ids=["l2", "squared"],
)
def test_the_goal_is_minus_the_distance_of_features_in_every_layer(norm, measure):
    model = build("nested").eval().double()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][:2]
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.setdefault(n, []).append(out))
        for n in names
    ]
    model(X.double())
    model(TARGET.double())
    for handle in handles:
        handle.remove()
    expected = -sum(measure((a - b).flatten(1)) for a, b in seen.values())
    found = value(FeatureMatch(layers=tuple(names), x_target=TARGET.double(), norm=norm), X.double(), model)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_what_follows_the_deepest_layer_is_left_out_unless_it_is_asked_for():
    model = build("nested").eval()
    runs = []
    model.head.register_forward_hook(lambda *_: runs.append(None))
    for stop_early, forwards in ((True, 0), (False, 2)):  # of the target, and of the images
        value(FeatureMatch(layers=("stem.0.0",), x_target=TARGET, stop_early=stop_early), X, model)
        assert len(runs) == forwards


def test_the_target_itself_is_the_best_that_can_be_reached():
    model = build("nested").eval()
    goal = FeatureMatch(layers=("head.fc",), x_target=X)
    torch.testing.assert_close(value(goal, X, model), torch.zeros(5), atol=2e-6, rtol=0)
    assert (value(goal, TARGET, model) < -1e-4).all()


def test_at_the_logits_it_is_a_targeted_attack_that_arrives():
    model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 3))
    wanted = model(TARGET).detach()
    goal = FeatureMatch(layers=("1",), x_target=TARGET, norm="squared")
    search = PGD(ThreatModel(eps=1.0), step_size=0.002, steps=100, random_start=False)
    x_adv = search(model, X, Y, goal=goal)
    with torch.no_grad():
        left, at_first = ((model(x) - wanted).norm(dim=1) for x in (x_adv, X))
    assert (left < 0.3 * at_first).all()


def test_momentum_adds_up_gradients_of_mean_size_one():
    """Two l_2 steps by hand: sign steps would hide how gradients are weighed."""
    model = build("nested").eval().double()
    x, y = X.double(), Y
    found = PGD(ThreatModel(norm="l2", eps=10.0), step_size=0.05, steps=3, random_start=False, momentum=0.7)(
        model, x, y
    )
    x_adv, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        x_adv.requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        velocity = 0.7 * velocity + g / g.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
        step = velocity / velocity.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x_adv = (x_adv.detach() + 0.05 * step).clamp(0, 1)
    torch.testing.assert_close(found, x_adv, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e-20])
def test_momentum_weighs_gradients_alike_however_small_they_are(scale):
    @dataclass(frozen=True)
    class Scaled:
        scale: float

        def bind(self, view, x, y):
            value = CrossEntropy().bind(view, x, y)
            return lambda x_adv: self.scale * value(x_adv)

    model = build("nested").eval().double()
    attack = PGD(ThreatModel(eps=0.5), step_size=0.05, steps=4, random_start=False, momentum=0.9)
    plain, scaled = (attack(model, X.double(), Y, goal=Scaled(s)) for s in (1.0, scale))
    torch.testing.assert_close(scaled, plain)


def test_momentum_leaves_an_image_without_gradient_where_it_is():
    y = torch.where(torch.arange(len(Y)) > 0, Y, -1)
    found = PGD(ThreatModel(eps=0.5), step_size=0.05, random_start=False, momentum=1.0)(build("nested"), X, y)
    assert torch.equal(found[0], X[0])
    assert (found[1:] != X[1:]).flatten(1).any(dim=1).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"attack momentum is -1; it must be a finite number >= 0"):
        PGD(ThreatModel(eps=0.1), step_size=0.1, momentum=-1)
    with pytest.raises(InputError, match="FeatureMatch needs at least one layer"):
        FeatureMatch(layers=(), x_target=X)
