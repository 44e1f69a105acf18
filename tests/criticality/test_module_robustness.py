"""Module robust criticality: against a reference written from its definition, and its properties."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from as_found import disturb, left_as_found
from toughen.attacks import PGD
from toughen.criticality.module_robustness import module_robustness
from toughen.errors import InputError
from toughen.layers import map_layers
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(12)
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2, random_start=False)


def robust_loss(model, attacked):
    total = sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in attacked)
    return float(total.detach()) / sum(len(y) for _, y in attacked)


def by_definition(model, name, attacked, *, eps, epochs):
    """MRC of one module as the official code finds it, with an optimizer on a copy."""
    model = copy.deepcopy(model).eval()
    weight = model.get_parameter(f"{name}.weight")
    start = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    losses = [robust_loss(model, attacked)]
    for _ in range(epochs):
        for x, y in attacked:
            optimizer.zero_grad()
            (-F.cross_entropy(model(x), y)).backward()
            optimizer.step()
        with torch.no_grad():
            ratio = float((weight - start).norm() / start.norm())
            if ratio > eps:
                weight.copy_(start + (weight - start) * eps / ratio)
        losses.append(robust_loss(model, attacked))
    return max(losses) - losses[0]


@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_it_is_the_largest_rise_of_the_robust_loss_that_the_ascent_finds(eps):
    model = build("normed").double()
    batches = [(x.double(), y) for x, y in BATCHES]
    report = module_robustness(model, batches, PGD2, eps=eps, epochs=3)
    attacked = [(PGD2(model, x, y), y) for x, y in batches]
    assert report.loss == pytest.approx(robust_loss(copy.deepcopy(model).eval(), attacked))
    assert [row.name for row in report.rows] == ["conv1", "conv2", "conv3", "head.fc"]
    for row in report.rows:
        assert row.mrc == pytest.approx(by_definition(model, row.name, attacked, eps=eps, epochs=3), rel=1e-6)
        assert row.weight_norm == pytest.approx(float(model.get_parameter(f"{row.name}.weight").detach().norm()))
    assert report.chosen == min(report.rows, key=lambda row: row.mrc)
    assert report.num_samples == 12


def test_for_a_linear_model_it_is_that_of_its_formula():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False)).double()
    x, y = X.double(), torch.zeros(12, dtype=torch.int64)
    report = module_robustness(linear, [(x, y)], PGD(ThreatModel(eps=0.0), step_size=0.0, steps=1), eps=0.01, epochs=50)
    # the logits differ by d = w^T x with w = w_1 - w_0; the worst change of the weight has length r = eps ||W||, and is
    # a rank-one matrix along some u with a share of +-1/sqrt(2) in either row
    weight = linear[1].weight.detach()
    radius = 0.01 * weight.norm()
    w = (weight[1] - weight[0]).clone().requires_grad_()
    u = torch.zeros_like(w)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(F.softplus(x.flatten(1) @ (w + u * radius * math.sqrt(2))).mean(), w)
        u = gradient / gradient.norm()
    worst = F.softplus(x.flatten(1) @ (w + u * radius * math.sqrt(2))).mean() - F.softplus(x.flatten(1) @ w).mean()
    assert report.rows[0].mrc == pytest.approx(float(worst.detach()), rel=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "tied", "called_twice", "dropouts", "shared_norm", "attention"])
def test_the_model_is_left_as_found_and_nothing_is_negative(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        report = module_robustness(model, BATCHES, PGD2, epochs=1)
    layers = map_layers(model, X)
    assert [row.name for row in report.rows] == [layer.name for layer in layers]
    assert all(row.mrc >= 0 for row in report.rows)
    assert any(row.mrc > 0 for row in report.rows)


def test_a_module_at_its_worst_has_criticality_zero():
    model = build("normed")
    with torch.no_grad():
        model.head.fc.weight.zero_()  # no weight before it can change a logit
    report = module_robustness(model, BATCHES, PGD2, epochs=2)
    assert [row.mrc for row in report.rows[:3]] == [0.0, 0.0, 0.0]
    assert report.chosen.name == "conv1"


def test_more_radius_and_more_passes_find_no_less():
    model = build("normed")
    mrc = [
        [row.mrc for row in module_robustness(model, BATCHES, PGD2, eps=eps, epochs=epochs).rows]
        for eps, epochs in ((0.05, 1), (0.05, 4), (0.5, 4))
    ]
    assert all(a <= b for a, b in zip(mrc[0], mrc[1], strict=True))
    assert sum(mrc[1]) < sum(mrc[2])


def test_the_scale_of_a_module_that_batch_norm_takes_out_changes_no_loss_and_no_other_module():
    model = build("normed").double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.conv1.weight.mul_(3.0)
        scaled.bn1.running_mean.mul_(3.0)
        scaled.bn1.running_var.add_(scaled.bn1.eps).mul_(9.0).sub_(scaled.bn1.eps)
    batches = [(x.double(), y) for x, y in BATCHES]
    found, expected = (module_robustness(m, batches, PGD2, epochs=1) for m in (scaled, model))
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    for row, other in zip(found.rows[1:], expected.rows[1:], strict=True):
        assert row.mrc == pytest.approx(other.mrc, rel=1e-6)


def test_the_same_seed_gives_the_same_report_and_progress_is_told():
    model = build("nested")
    attack = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=1)
    done = []
    found = [module_robustness(model, BATCHES, attack, epochs=1, seed=seed, progress=done.append) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].loss != found[2].loss
    assert done == [1, 2, 3, 4] * 3


def test_each_batch_starts_its_attack_elsewhere():
    starts = []

    def attack(model, x, y, *, generator):
        starts.append(torch.rand(3, generator=generator))
        return x

    attack.threat = ThreatModel(eps=0.1)
    module_robustness(build("nested"), BATCHES, attack, epochs=1)
    assert not torch.equal(*starts)


def test_images_without_a_label_and_layers_that_are_not_asked_for_are_left_out():
    model = build("normed")
    unlabelled = (X[:4], torch.full((4,), -1))
    mixed = (torch.cat([X[:8], X[:4]]), torch.cat([Y[:8], unlabelled[1]]))
    layers = [map_layers(model, X).by_name("conv3")]
    found = module_robustness(model, [unlabelled, mixed], PGD2, epochs=1, layers=layers)
    assert found == module_robustness(model, [BATCHES[0]], PGD2, epochs=1, layers=layers)
    assert [row.name for row in found.rows] == ["conv3"]


def test_an_ascent_that_leaves_all_numbers_is_the_most_critical():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-18)  # so the gradient of the last layer's weight is small, and that of the first huge
        model[2].weight.mul_(3e38)
    report = module_robustness(model, BATCHES, PGD(ThreatModel(eps=0.0), step_size=0.0, steps=1), epochs=1)
    assert report.rows[0].mrc == math.inf
    assert report.chosen.name == "2"


def test_a_network_that_has_left_all_numbers_is_refused():
    model = build("normed")
    with torch.no_grad():
        model.conv1.weight.fill_(math.nan)
    with pytest.raises(InputError, match="the loss of Normed on the adversarial images is nan; nothing to measure"):
        module_robustness(model, BATCHES, PGD2)


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        (BATCHES, {"eps": 0.0}, "module robustness eps is 0.0 and epochs 10; they must be > 0 and at least 1"),
        (BATCHES, {"eps": math.inf}, "module robustness eps is inf"),
        (BATCHES, {"epochs": 0}, "eps is 0.1 and epochs 0"),
        ([], {}, "no labelled images to measure module robustness on"),
        ([(X, torch.full((12,), -1))], {}, "no labelled images"),
        (BATCHES, {"layers": []}, "none of the layers of Normed owns its weight"),
        ([(X * 300, Y)], {}, "outside"),
    ],
)
def test_what_can_not_be_measured_is_refused(batches, settings, message):
    with pytest.raises(InputError, match=message):
        module_robustness(build("normed"), batches, PGD2, **settings)
