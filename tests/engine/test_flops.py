from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from as_found import left_as_found
from toughen import CLAT, PGD, PGDAT, Batch, ThreatModel, models
from toughen.engine.flops import flops_per_image


class ConvLinear(nn.Module):
    """One convolution and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.fc = nn.Linear(5 * 8 * 8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def images(count: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, 8, 8, generator=draw), torch.arange(count) % 4


def pgd(steps: int) -> PGD:
    return PGD(ThreatModel(eps=0.1), step_size=0.02, steps=steps)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_pgd_at_counts_what_the_formula_says(steps, count):
    conv = 2 * (5 * 8 * 8) * (3 * 3 * 3)  # a multiplication and an addition per weight and output
    fc = 2 * (5 * 8 * 8) * 4
    # an attack step is a forward, and a backward to the image; training is a forward and a backward to the
    # weights, which needs the gradient of the linear layer's input but not of the image
    expected = steps * 2 * (conv + fc) + (2 * conv + 3 * fc)
    assert flops_per_image(PGDAT().bind(ConvLinear(), attack=pgd(steps)), Batch(*images(count))) == expected


def clat_cost(layer: str, forward: str) -> float:
    model = models.create("small_cnn", in_channels=1, width=4, seed=0)
    attack = pgd(3)
    live = CLAT(select="fixed", layers=(layer,), lam=0.1, forward=forward).bind(model, attack=attack)
    live.epoch_start(0, [images(4, channels=1)])
    return flops_per_image(live, Batch(*images(4, channels=1)))


def test_a_shallow_layer_costs_less_when_the_forward_stops_there():
    assert clat_cost("layer1.0.conv", "truncated") < 0.5 * clat_cost("layer1.0.conv", "full")


def test_truncation_saves_more_the_shallower_the_layer():
    names = ("layer1.0.conv", "layer2.0.conv", "layer3.1.conv")
    saved = [clat_cost(name, "truncated") / clat_cost(name, "full") for name in names]
    assert saved == sorted(saved)
    assert saved[-1] <= 1


def test_counting_touches_neither_model_nor_random_state_nor_the_method():
    model = models.create("small_cnn", in_channels=1, width=4, seed=0)
    live = CLAT(k=1, lam=0.1).bind(model, attack=pgd(2))
    live.epoch_start(0, [images(4, channels=1)])
    before = deepcopy(live.state_dict())

    with left_as_found(model):
        flops_per_image(live, Batch(*images(2, channels=1)))

    assert live.state_dict() == before
