"""The attack leaves the model, and torch's random state, exactly as found."""

import pytest
import torch
from torch import nn

from as_found import disturb, left_as_found
from toughen.attacks import PGD, CrossEntropy, FeatureShift, KLToClean
from toughen.layers import ModelView, map_layers
from toughen.types import ThreatModel
from zoo import EVERY, build, images

X, Y = images(4)
THREAT = ThreatModel(eps=0.1)


@pytest.mark.parametrize("start", ["train", "eval", "mixed"])
@pytest.mark.parametrize("model_mode", ["eval", "unchanged"])
@pytest.mark.parametrize("name", EVERY)
def test_an_attack_leaves_the_model_as_found(name, model_mode, start):
    model = build(name)
    first = map_layers(model, X[:1])[0].name
    if start == "mixed":
        disturb(model)
    else:
        model.train(start == "train")
    attack = PGD(THREAT, step_size=0.05, steps=2, model_mode=model_mode)
    with left_as_found(model):
        attack(model, X, Y, goal=CrossEntropy())
        attack(model, X, Y, goal=FeatureShift(layers=(first,)))


class Fails(nn.Module):
    """Raises in its n-th forward, after its layers have run."""

    def __init__(self, name: str, at: int) -> None:
        super().__init__()
        self.inner, self.left = build(name), at

    def forward(self, x):
        out = self.inner(x)
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of luck")
        return out


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("model_mode", ["eval", "unchanged"])
@pytest.mark.parametrize("name", ["normed", "dropouts", "counting"])
def test_also_when_the_model_raises_inside(name, model_mode, at):
    model = Fails(name, at)
    disturb(model)
    attack = PGD(THREAT, step_size=0.05, steps=3, model_mode=model_mode)
    goal = KLToClean() if at < 3 else FeatureShift(layers=("inner.conv" if name != "normed" else "inner.conv2",))
    if at == 3:
        goal = FeatureShift(layers=goal.layers, stop_early=False)
    with left_as_found(model), pytest.raises(RuntimeError, match="out of luck"):
        attack(model, X, Y, goal=goal)


def test_by_default_the_attack_sees_the_model_in_eval_mode():
    model = build("normed")
    seen: list[bool] = []
    model.bn1.register_forward_hook(lambda module, *_: seen.append(module.training))
    PGD(THREAT, step_size=0.05, steps=2, fold_norms=False)(model, X, Y)
    assert seen == [False, False]


def test_unchanged_mode_attacks_with_batch_statistics():
    model = build("normed")
    seen: list[bool] = []
    model.bn1.register_forward_hook(lambda module, *_: seen.append(module.training))
    PGD(THREAT, step_size=0.05, steps=2, model_mode="unchanged")(model, X, Y)
    assert seen == [True, True]


def test_the_attack_asks_for_no_gradient_of_any_weight():
    model = build("normed")
    asked: list[bool] = []
    model.register_forward_hook(lambda module, *_: asked.append(any(p.requires_grad for p in module.parameters())))
    PGD(THREAT, step_size=0.05, steps=1)(model, X, Y)
    assert asked == [False]


def test_an_attack_inside_a_training_step_changes_no_gradient_of_that_step():
    model = build("normed")
    plain = torch.autograd.grad(model(X).square().sum(), list(model.parameters()))
    model = build("normed")
    loss = model(X).square().sum()
    PGD(THREAT, step_size=0.05, steps=1)(model, X, Y)
    for a, b in zip(plain, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.equal(a, b)


def test_an_attack_does_not_invalidate_a_graph_through_eval_mode_batch_norm():
    model = build("normed").eval()
    loss = model(X).square().sum()
    PGD(THREAT, step_size=0.05, steps=1)(model, X, Y)
    loss.backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_binding_a_goal_changes_nothing_either():
    model = build("normed").eval()
    with left_as_found(model):
        KLToClean().bind(ModelView(model), X, Y)
