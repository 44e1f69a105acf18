"""Substitutes for weights: found at every place that reads them, and gone afterwards."""

import torch
from torch import nn
from torch.func import functional_call

from toughen.layers.substitutes import substitutes


def test_a_weight_is_named_at_each_place_that_reads_it_and_a_module_under_its_first_name():
    conv, tied = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
    tied.weight = conv.weight
    model = nn.ModuleDict({"one": conv, "two": tied, "again": conv})
    other = torch.zeros_like(conv.weight)
    assert substitutes(model, {conv.weight: other}) == {"one.weight": other, "two.weight": other}
    assert substitutes(conv, {conv.weight: other}) == {"weight": other}
    assert substitutes(model, {}) == {}


def test_the_module_computes_with_them_and_is_left_as_found():
    twice = nn.Linear(2, 2, bias=False)
    model, weight = nn.Sequential(twice, twice), twice.weight
    found = functional_call(
        model, substitutes(model, {weight: 2 * torch.eye(2)}), (torch.ones(1, 2),), tie_weights=False
    )
    assert found.tolist() == [[4.0, 4.0]]
    assert model[0].weight is model[1].weight is weight
