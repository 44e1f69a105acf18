"""The adapters of benchmarks/peers.py: one attack, whichever library makes it, and a reason for each that cannot."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toughen import PGD, ThreatModel, models

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 3
MODULES = {
    "adversarial-robustness-toolbox": "art",
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "adv-lib": "adv_lib",
}
HERE = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=HERE)
def peer(request: pytest.FixtureRequest, peers: ModuleType) -> Any:
    return named(request.param, peers)


def named(name: str, peers: ModuleType) -> Any:
    found, absent = peers.installed(eps=EPS, step_size=STEP_SIZE, steps=STEPS)
    assert name not in absent, absent[name]
    return next(peer for peer in found if peer.name == name)


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """A network in train mode, images and wrong labels: adv-lib would return images unchanged that it cannot fool."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = models.create("resnet18", num_classes=10, width=4, seed=0).eval()
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmin(dim=1)
    return model.train(), x, y


def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


@pytest.mark.filterwarnings("default")  # what other libraries warn of
class TestEveryPeer:
    def test_the_perturbation_stays_in_the_ball_and_raises_the_loss_like_ours(self, peer: Any, case: Any) -> None:
        model, x, y = case

        x_adv = peer.perturb(model, x, y)

        assert not x_adv.requires_grad
        assert (x_adv - x).abs().max().item() == pytest.approx(EPS, rel=1e-4)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        clean = loss(model, x, y)
        ours = loss(model, PGD(ThreatModel(eps=EPS), step_size=STEP_SIZE, steps=STEPS)(model, x, y), y)
        assert ours - clean > 0.01
        # adv-lib returns its last iterate but one
        assert loss(model, x_adv, y) - clean > (STEPS - 1) / STEPS * 0.9 * (ours - clean)

    def test_it_takes_as_many_steps_as_asked_each_of_the_step_size_from_a_random_start(
        self, peer: Any, case: Any
    ) -> None:
        model, x, y = case
        seen: list[Tensor] = []
        modes: list[bool] = []

        def remember(_: nn.Module, given: tuple[Tensor]) -> None:
            if torch.is_grad_enabled() and given[0].requires_grad:
                seen.append(given[0].detach().clone())
                modes.append(model.training)

        with model.register_forward_pre_hook(remember):
            peer.perturb(model, x, y)

        assert modes == [False] * STEPS
        assert EPS / 2 < (seen[0] - x).abs().max() <= EPS * 1.0001
        for before, after in itertools.pairwise(seen):
            assert (after - before).abs().max().item() == pytest.approx(STEP_SIZE, rel=1e-4)
        assert model.training


@pytest.mark.filterwarnings("default")
def test_the_trainer_of_art_takes_one_step_of_the_optimizer_on_perturbed_images(peers: ModuleType, case: Any) -> None:
    pytest.importorskip("art", reason="ART is optional: pip install 'toughen[bench]'")
    model, x, y = case
    trained: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, given: trained.append(given[0].detach()) if model.training else None)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    named("adversarial-robustness-toolbox", peers).step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)

    (images,) = trained
    nearest = (images[:, None] - x[None]).abs().flatten(2).amax(dim=2).amin(dim=1)  # it shuffles the batch
    torch.testing.assert_close(nearest, torch.full((8,), EPS), rtol=1e-4, atol=0)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_library_that_does_not_import_is_told_with_its_reason(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)

    found, absent = peers.installed(eps=EPS, step_size=STEP_SIZE, steps=STEPS)

    assert absent["torchattacks"].startswith("ModuleNotFoundError: import of torchattacks halted")
    assert sorted([*absent, *(peer.name for peer in found)]) == sorted(MODULES)


def test_foolbox_is_measured_with_its_version(peers: ModuleType) -> None:
    foolbox = pytest.importorskip("foolbox", reason="foolbox is optional: pip install 'toughen[attacks]'")

    found, _ = peers.installed(eps=EPS, step_size=STEP_SIZE, steps=STEPS)

    assert ("foolbox", foolbox.__version__) in [(peer.name, peer.version) for peer in found]
