"""Curvature weakness (Eq. 9) against a closed form and against finite differences."""

import pytest
import torch
from torch import nn

from toughen.attacks import PGD
from toughen.criticality import CriticalityOptions, analyze
from toughen.criticality.curvature import curvature
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.types import ThreatModel


def perturbed(count, *shape):
    draw = torch.Generator().manual_seed(3)
    x = 0.3 + 0.4 * torch.rand(count, *shape, generator=draw, dtype=torch.float64)
    return x, x + 0.1 * torch.randn(count, *shape, generator=draw, dtype=torch.float64)


def test_of_a_linear_layer_it_is_the_length_of_a_transposed_a_d():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    x, x_adv = perturbed(4, 3, 2, 2)
    a, d = model[1].weight.detach(), (x_adv - x).flatten(1)
    expected = (d @ a.T @ a).norm(dim=1) / d.norm(dim=1)
    found = curvature(ModelView(model), x, x_adv, "1", model(x).detach())
    torch.testing.assert_close(found, expected)


def test_the_gradient_term_agrees_with_finite_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Tanh()).double()
    x, x_adv = perturbed(2, 1, 4, 4)
    clean = model[:3](x).detach()

    def energy(z):
        return 0.5 * (model[:3](z) - clean).square().flatten(1).sum(dim=1)

    gradient = torch.zeros_like(x)
    with torch.no_grad():
        for pixel in range(16):
            step = torch.zeros(16, dtype=torch.float64)
            step[pixel] = 1e-5
            step = step.view(1, 1, 4, 4)
            gradient.view(2, 16)[:, pixel] = (energy(x_adv + step) - energy(x_adv - step)) / 2e-5
    expected = gradient.flatten(1).norm(dim=1) / (x_adv - x).flatten(1).norm(dim=1)
    found = curvature(ModelView(model), x, x_adv, "2", clean)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_it_is_zero_where_nothing_was_perturbed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    x, x_adv = perturbed(2, 3, 2, 2)
    x_adv[0] = x[0]
    found = curvature(ModelView(model), x, x_adv, "1", model(x).detach())
    assert found[0] == 0
    assert found[1] > 0


@pytest.mark.parametrize(("norm", "size"), [("dim", 5.0), ("rms", 5**0.5), ("none", 1.0)])
def test_in_an_analysis_it_is_divided_like_the_index(norm, size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)).double()
    x, _ = perturbed(4, 3, 2, 2)
    y = torch.tensor([0, 1, 2, 0])
    attack = PGD(ThreatModel(eps=0.05), step_size=0.02, steps=2, random_start=False)
    options = CriticalityOptions(measure="curvature", norm=norm)
    rows = analyze(model, [(x, y)], attack, options=options).rows
    a, d = model[1].weight.detach(), (attack(model, x, y) - x).flatten(1)
    expected = (d @ a.T @ a).norm(dim=1) / d.norm(dim=1) / size
    assert rows[0].weakness == pytest.approx(float(expected.mean()))
    assert rows[1].criticality == pytest.approx(rows[1].weakness / rows[0].weakness)


@pytest.mark.parametrize(("norm", "size"), [("dim", 12.0), ("rms", 12**0.5), ("none", 1.0)])
def test_the_first_layer_relative_to_the_image_which_counts_where_it_moved(norm, size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)).double()
    x, _ = perturbed(4, 3, 2, 2)
    x[0] = 0  # nothing moves here: the attack below goes down, and the box begins at 0

    def attack(model, x, y, *, generator):
        return (x - 0.01).clamp_min(0)

    attack.threat = ThreatModel(eps=0.01)
    options = CriticalityOptions(measure="curvature", norm=norm, first="input_ratio")
    first = analyze(model, [(x, torch.zeros(4, dtype=torch.int64))], attack, options=options).rows[0]
    assert first.criticality == pytest.approx(first.weakness / (0.75 / size))


def test_what_follows_a_layer_is_left_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)).double()
    runs = []
    model[2].register_forward_hook(lambda *_: runs.append(None))
    x, x_adv = perturbed(4, 3, 2, 2)
    curvature(ModelView(model), x, x_adv, "1", model[:2](x).detach())
    assert runs == []


@pytest.mark.parametrize("change", [{"norm": "relative"}, {"predecessor": "graph"}])
def test_meaningless_combinations_are_refused(change):
    with pytest.raises(InputError, match="measure='curvature' differentiates layer outputs"):
        CriticalityOptions(measure="curvature", **change)
