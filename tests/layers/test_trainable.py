"""Frozen means bit-identical: no parameter, no buffer, not under momentum, not under weight decay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toughen.layers import TrainableSet, map_layers
from zoo import ZOO, build, images

X, Y = images(4)
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}


def steps(model: nn.Module, trainable: TrainableSet | None, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    """Some real steps of a loop that puts the model into train mode and zeroes gradients in the worst way."""
    for _ in range(count):
        model.train()
        if trainable is not None:
            trainable.apply_mode()
        optimizer.zero_grad(set_to_none=trainable is None)
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", [n for n in ZOO if n != "dropouts"])
def test_after_real_steps_exactly_the_selected_layer_changed(name, kind):
    model = build(name)
    layers = map_layers(model, X[:1])
    optimizer = OPTIMIZERS[kind](model)
    trainable = TrainableSet(model)
    steps(model, None, optimizer)  # momentum everywhere, which must not coast on
    trainable.select([layers.selectable[-1]])
    before = state(model)
    steps(model, trainable, optimizer)
    expected = set(layers.selectable[-1].parameters)
    if name == "tied":
        expected.add("a.weight")  # the same tensor under its other name
    assert changed(model, before) == expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_second_selection_freezes_the_first(kind):
    model = build("backwards")
    layers = map_layers(model, X[:1])
    optimizer, trainable = OPTIMIZERS[kind](model), TrainableSet(model)
    trainable.select([layers.by_name("first")])
    steps(model, trainable, optimizer)
    trainable.select([layers.by_name("third")])
    before = state(model)
    steps(model, trainable, optimizer)
    assert changed(model, before) == {"third.weight", "third.bias"}


def test_gradients_of_unselected_parameters_are_dropped_and_stay_none():
    model = build("backwards")
    F.cross_entropy(model(X), Y).backward()
    TrainableSet(model).select([map_layers(model, X[:1]).by_name("second")])
    F.cross_entropy(model(X), Y).backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {"second.weight", "second.bias"}


def statistics_that_moved(**policy: str) -> set[str]:
    model = build("normed")
    trainable = TrainableSet(model, **policy)
    trainable.select([map_layers(model, X[:1]).by_name("conv1")])
    before = state(model)
    steps(model, trainable, OPTIMIZERS["sgd"](model))
    return {name.split(".")[0] for name in changed(model, before) if "running" in name or "num_batches" in name}


def test_frozen_norm_statistics_do_not_move():
    assert statistics_that_moved(norm_stats="frozen") == set()


def test_following_norm_statistics_move_behind_the_selected_layer_alone():
    assert statistics_that_moved(norm_stats="follow") == {"bn1"}


def test_updated_norm_statistics_all_move():
    assert statistics_that_moved(norm_stats="update") == {"bn1", "bn2"}


@pytest.mark.parametrize(("affine", "expected"), [("frozen", set()), ("follow", {"bn1.weight", "bn1.bias"})])
def test_scale_and_shift_behind_a_selected_layer_train_only_if_asked(affine, expected):
    model = build("normed")
    trainable = TrainableSet(model, norm_affine=affine)
    trainable.select([map_layers(model, X[:1]).by_name("conv1")])
    before = state(model)
    steps(model, trainable, OPTIMIZERS["sgd"](model))
    assert changed(model, before) == {"conv1.weight"} | expected


def test_following_stops_when_the_layer_leaves_the_selection():
    model = build("normed")
    layers = map_layers(model, X[:1])
    trainable = TrainableSet(model, norm_stats="follow")
    trainable.select([layers.by_name("conv1")])
    assert model.bn1.training
    trainable.select([layers.by_name("conv3")])
    assert not model.bn1.training
    assert not model.bn2.training


def test_no_batch_norm_is_put_into_train_mode_while_the_model_is_in_eval_mode():
    model = build("normed").eval()
    TrainableSet(model, norm_stats="follow").select([map_layers(model, X[:1]).by_name("conv1")])
    assert not model.bn1.training


def test_a_parameter_that_never_asked_for_gradients_stays_frozen_when_selected():
    model = build("backwards")
    model.second.bias.requires_grad_(False)
    trainable = TrainableSet(model)
    trainable.select([map_layers(model, X[:1]).by_name("second")])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["second.weight"]


def test_restore_gives_every_parameter_its_flag_and_batch_norm_its_mode_back():
    model = build("normed")
    model.conv3.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainable = TrainableSet(model)
    trainable.select([map_layers(model, X[:1]).by_name("conv1")])
    trainable.restore()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    trainable.apply_mode()
    assert model.bn1.training
