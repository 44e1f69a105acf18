"""Scoped hooks and modes: whatever happens inside, the model is left as found."""

import pytest
import torch

from as_found import left_as_found
from toughen.errors import InputError
from toughen.layers import tap
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from zoo import build, images

X = images(2)[0]
WRONG_IMAGES = torch.zeros(2, 5, 8, 8)  # five channels: the first convolution raises


def test_a_tap_sees_each_named_output_in_order_of_execution():
    model, seen = build("backwards").eval(), []
    with tap(model, ["third", "first"], lambda name, value: seen.append((name, tuple(value.shape)))):
        model(X)
    assert seen == [("first", (2, 4, 6, 6)), ("third", (2, 6, 2, 2))]


def test_a_tap_sees_the_value_before_it_is_changed_in_place():
    model, seen = build("in_place").eval(), {}
    with torch.no_grad(), tap(model, ["conv"], lambda name, value: seen.update({name: value.clone()})):
        model(X)
    assert torch.equal(seen["conv"], model.conv(X))
    assert seen["conv"].min() < 0


@pytest.mark.parametrize("name", ["backwards", "by_keyword"])
def test_a_tap_on_the_input_sees_the_first_argument(name):
    model, seen = build(name).eval(), []
    first = "first" if name == "backwards" else "conv"
    with tap(model, [first], lambda _, value: seen.append(value), side="input"):
        model(X)
    assert len(seen) == 1
    assert seen[0] is X


def test_a_tap_changes_no_output():
    model = build("nested").eval()
    plain = model(X)
    with tap(model, ["stem.0.0", "head.fc"], lambda _name, _value: None):
        assert torch.equal(model(X), plain)


@pytest.mark.parametrize("side", ["output", "input"])
def test_no_hook_is_left_behind_when_the_function_raises(side):
    def fail(name, value):
        raise KeyError(name)

    model = build("nested").eval()
    with left_as_found(model), pytest.raises(KeyError), tap(model, ["stem.0.0", "head.fc"], fail, side=side):
        model(X)


def test_no_hook_is_left_behind_when_the_model_raises():
    model = build("backwards")
    with left_as_found(model), pytest.raises(RuntimeError), tap(model, ["head.fc"], lambda _n, _v: None):
        model(WRONG_IMAGES)


def test_no_hook_is_left_behind_when_a_later_name_is_unknown():
    model = build("nested")
    with (
        left_as_found(model),
        pytest.raises(InputError, match=r"unknown layer 'head\.fx'; did you mean 'head\.fc'"),
        tap(model, ["stem.0.0", "head.fx"], lambda _n, _v: None),
    ):
        pytest.fail("the body must not run")


def test_a_users_own_hooks_stay():
    model, calls = build("nested").eval(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    with tap(model, ["head"], lambda _n, _v: None):
        model(X)
    model(X)
    assert len(calls) == 2


def test_modes_go_back_module_by_module_even_after_an_error():
    model = build("normed")
    model.bn1.eval()
    with left_as_found(model), pytest.raises(RuntimeError), mode(model, training=False):
        model(WRONG_IMAGES)
    with mode(model, training=False):
        assert not any(module.training for module in model.modules())


def test_weight_gradients_come_back_only_where_they_were():
    model = build("normed")
    model.conv1.weight.requires_grad_(False)
    with left_as_found(model), pytest.raises(RuntimeError), without_weight_gradients(model):
        model(WRONG_IMAGES)
    with without_weight_gradients(model):
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["normed", "counting"])
def test_buffers_get_their_values_back(name):
    model = build(name)
    before = {buffer: value.clone() for buffer, value in model.named_buffers()}
    with left_as_found(model), buffers_kept(model):
        model(X)
        assert not any(torch.equal(value, before[buffer]) for buffer, value in model.named_buffers())


def test_keeping_buffers_does_not_invalidate_a_graph_that_uses_them():
    model = build("normed").eval()
    loss = model(X).sum()
    with buffers_kept(model):
        model(X)
    loss.backward()
    assert model.conv1.weight.grad is not None


@pytest.mark.parametrize("name", ["noisy", "dropouts"])
def test_the_global_random_state_comes_back(name):
    model = build(name)
    with left_as_found(model), random_state_kept(model):
        assert not torch.equal(model(X), model(X))
