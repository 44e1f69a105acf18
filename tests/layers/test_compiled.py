"""Compiled forwards: the same features and attacks, taps that still see, and a fallback where nothing can be traced."""

import shutil
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.attacks import PGD, FeatureShift
from toughen.layers import ModelView, compile_forward, map_layers
from toughen.layers.compiled import compiled_features
from toughen.types import ThreatModel
from zoo import ZOO, build, images

X, Y = images(4)
LOOKS_AT_ITS_IMAGES = ("windowed", "windows_first", "queries_first")  # Python numbers decide there
ATTACK = PGD(ThreatModel(eps=0.05), step_size=0.0125, steps=3)


@pytest.fixture
def uncompiled(monkeypatch):
    """What is handed to the compiler runs as it is: what is tested is which part of the forward that is."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ZOO)
def test_a_forward_to_some_layers_gives_their_features_bit_for_bit(name):
    model = build(name).eval()
    layers = [layer.name for layer in map_layers(model, X[:1]).measurable]
    expected = ModelView(model).features(X, layers[:2]).values
    compile_forward(model)
    shortened = compiled_features(model, layers[:2])
    found = ModelView(model).features(X, layers[:2], stop_early=True).values
    assert all(torch.equal(found[layer], expected[layer]) for layer in layers[:2])
    assert (shortened is None) == (name in LOOKS_AT_ITS_IMAGES)


@pytest.mark.usefixtures("uncompiled")
def test_what_follows_the_deepest_layer_is_left_out():
    model = build("backwards").eval()
    compile_forward(model)
    order = [layer.name for layer in map_layers(model, X[:1]).measurable]
    ran: list[str] = []
    shortened = compiled_features(model, order[:2])
    for name in order:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    shortened(X)
    assert ran == order[:2]


def test_a_model_that_is_not_compiled_and_a_copy_of_one_have_no_compiled_forward():
    model = build("nested").eval()
    assert compiled_features(model, ["head.fc"]) is None
    compile_forward(model)
    assert compiled_features(deepcopy(model), ["head.fc"]) is None


class Scaled(nn.Module):
    """A weight of its own beside a part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.dropout(x * self.scale, training=self.training))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "0", nn.Conv2d(3, 3, 1)),
        lambda model: setattr(model[1], "scale", nn.Parameter(torch.tensor(2.0))),
        lambda model: model[1].train(),
        lambda model: model.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        lambda model: model[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    ],
    ids=["module", "weight", "mode", "hook", "hook of a part"],
)
def test_what_was_exchanged_since_the_forward_was_compiled_is_seen(change):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Scaled(), nn.Flatten(), nn.Linear(108, 4)).eval()
    compile_forward(model)

    def features(*, stop_early: bool) -> Tensor:
        torch.manual_seed(0)
        return ModelView(model).features(X, ["1.conv"], stop_early=stop_early).values["1.conv"]

    before = features(stop_early=True)
    change(model)
    after = features(stop_early=True)
    assert torch.equal(after, features(stop_early=False))
    assert not torch.equal(after, before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_attacks_on_a_compiled_model_find_the_same_up_to_rounding_and_taps_still_see():
    model = build("nested").eval()
    layer = map_layers(model, X[:1]).measurable[0].name
    goals = (None, FeatureShift(layers=(layer,)))

    def found() -> list[torch.Tensor]:
        return [ATTACK(model, X, Y, goal=goal, generator=torch.Generator().manual_seed(0)) for goal in goals]

    expected, features = found(), ModelView(model).features(X, [layer])
    compile_forward(model)
    for a, b in zip(found(), expected, strict=True):
        assert torch.isclose(a, b).float().mean() > 0.99
    again = ModelView(model).features(X, [layer])
    assert torch.equal(again.values[layer], features.values[layer])
    assert torch.equal(again.logits, features.logits)
