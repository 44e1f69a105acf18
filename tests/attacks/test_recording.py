"""Recorded searches. Without a GPU a recording is replayed by calling the search again on the tensors that it holds."""

import pytest
import torch
from torch import Tensor, nn

from as_found import left_as_found
from toughen.attacks import PGD, CrossEntropy, FeatureShift, KLToClean, pgd, recording
from toughen.errors import InputError
from toughen.methods import CLAT
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(4)
OTHER, OTHER_Y = images(4, seed=1)
THREAT = ThreatModel(eps=0.05)
made: list["CalledAgain"] = []


class CalledAgain(recording._Recording):
    """Holds inputs as a CUDA graph does; what a graph would have fixed when it was recorded stays as it was then."""

    def __init__(self, search: recording.Search, tensors: list[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.search = search
        made.append(self)

    def replay(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        for held, tensor in zip(self.inputs, tensors, strict=True):
            held.copy_(tensor)
        x_adv, value = self.search(*self.inputs)
        return x_adv.clone(), value.clone()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    made.clear()
    monkeypatch.setattr(recording, "_Recording", CalledAgain)
    monkeypatch.setattr(pgd, "can_record", lambda _: True)


def attacked(model: nn.Module, x: Tensor = X, y: Tensor = Y, *, seed: int = 0, goal=None, **settings) -> Tensor:
    attack = PGD(THREAT, step_size=0.02, steps=3, **settings)
    return attack(model, x, y, goal=goal, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("goal", [None, KLToClean(), FeatureShift(layers=("conv2",))], ids=["ce", "kl", "features"])
@pytest.mark.parametrize("settings", [{}, {"keep": "worst"}, {"restarts": 2}, {"momentum": 0.9}], ids=str)
def test_a_replay_is_the_search_itself_for_every_batch(goal, settings):
    model = build("normed")
    for number, (x, y) in enumerate([(X, Y), (OTHER, OTHER_Y), (X, Y)]):
        plain = attacked(model, x, y, seed=number, goal=goal, **settings)
        with left_as_found(model):
            replayed = attacked(model, x, y, seed=number, goal=goal, cuda_graph=True, **settings)
        assert torch.equal(replayed, plain)
    assert len(made) == 1


def test_it_reads_weights_that_were_changed_in_place_and_is_made_anew_for_exchanged_ones():
    model = build("normed")
    attacked(model, cuda_graph=True)
    with torch.no_grad():
        model.conv1.weight.mul_(-2)
    assert torch.equal(attacked(model, cuda_graph=True), attacked(model))
    assert len(made) == 1
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * -2)
    assert torch.equal(attacked(model, cuda_graph=True), attacked(model))
    assert len(made) == 2


def test_it_is_made_anew_when_a_module_without_weights_was_exchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    attacked(model, cuda_graph=True)
    model[1] = nn.Tanh()
    attacked(model, cuda_graph=True)
    assert len(made) == 2


def test_another_goal_batch_size_or_setting_has_a_recording_of_its_own_and_the_latest_two_are_kept():
    model = build("normed")
    attacked(model, cuda_graph=True)
    attacked(model, cuda_graph=True, goal=CrossEntropy())  # the default
    assert len(made) == 1
    attacked(model, cuda_graph=True, goal=KLToClean())
    attacked(model, X[:3], Y[:3], cuda_graph=True)
    attacked(model, cuda_graph=True, momentum=0.5)
    assert len(made) == 4
    attacked(model, cuda_graph=True, momentum=0.5)
    attacked(model, X[:3], Y[:3], cuda_graph=True)
    assert len(made) == 4
    attacked(model, cuda_graph=True)
    assert len(made) == 5


def test_features_that_a_goal_was_given_are_an_input_too():
    model = build("normed").eval()
    for x, y in ((X, Y), (OTHER, OTHER_Y)):
        clean = {"conv2": torch.randn_like(_feature(model, x))}
        goal = FeatureShift(layers=("conv2",), clean=clean)
        assert torch.equal(attacked(model, x, y, goal=goal, cuda_graph=True), attacked(model, x, y, goal=goal))
    assert len(made) == 1


def _feature(model: nn.Module, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.conv2.register_forward_hook(lambda _m, _x, out: seen.append(out.detach()))
    model(x)
    handle.remove()
    return seen[0]


def test_a_step_of_clat_with_a_recorded_attack_is_the_step_without():
    found = []
    for cuda_graph in (False, True):
        model = build("normed")
        attack = PGD(THREAT, step_size=0.02, steps=3, cuda_graph=cuda_graph)
        live = CLAT(select="fixed", layers=("conv2",), lam=0.5).bind(model, attack=attack)
        live.epoch_start(0, [(X, Y)])
        made.clear()
        optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
        for x, y in ((X, Y), (OTHER, OTHER_Y), (X, Y)):
            loss = live(x, y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(model.conv2.weight.detach())
    assert torch.equal(*found)
    assert len(made) == 1


def test_batch_statistics_can_not_be_recorded():
    with pytest.raises(InputError, match="cuda_graph needs model_mode='eval'"):
        PGD(THREAT, step_size=0.01, cuda_graph=True, model_mode="unchanged")


@pytest.mark.gpu
@pytest.mark.parametrize("goal", [None, FeatureShift(layers=("layer2.0.conv1",))])
def test_on_a_gpu_a_replay_finds_what_the_search_finds(goal, monkeypatch):
    monkeypatch.undo()
    model = build("resnet18").cuda().eval()
    x, y = X.cuda(), Y.cuda()
    for seed in range(3):
        found = [
            PGD(THREAT, step_size=0.02, steps=3, cuda_graph=recording_it)(
                model, x, y, goal=goal, generator=torch.Generator("cuda").manual_seed(seed)
            )
            for recording_it in (False, True)
        ]
        assert torch.isclose(*found).float().mean() > 0.99
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


def test_a_goal_that_can_not_be_recognised_is_refused():
    class Changing(CrossEntropy):
        __hash__ = None

    with pytest.raises(InputError, match="recognises a goal by its value, and Changing has none that stays"):
        attacked(build("normed"), goal=Changing(), cuda_graph=True)
