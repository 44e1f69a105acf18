"""SWA and EMA against their sums by hand; the network in training must not notice them."""

import io
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from as_found import same
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.methods import CLAT, EMA, SWA, LiveWrapper, stack
from toughen.objectives import PGDAT
from toughen.types import Batch, ThreatModel
from zoo import build, images

X, Y = images(8)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
BATCHES = [(X, Y), (X.flip(0).square(), Y)]


def bound(method, model=None, inner=None):
    model = build("normed") if model is None else model
    if inner is None:
        return stack(PGDAT(), method).bind(model, attack=PGD2)
    return method.bind(model, attack=PGD2, inner=inner)


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def epochs(live, values, batches=BATCHES):
    """Epochs of one step each, after which all weights are the given value."""
    for epoch, value in enumerate(values):
        live.epoch_start(epoch)
        fill(live.model, value)
        live.step_end()
        live.epoch_end(iter(batches))


def train(live, count, first=0):
    """Epochs of two real steps; returns the losses."""
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(first, first + count):
        live.model.train()
        live.epoch_start(epoch, BATCHES, optimizer=optimizer)
        for x, y in BATCHES:
            out = live(x, y)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            live.step_end()
            losses.append(out.loss.detach())
        live.epoch_end(iter(BATCHES))
    return losses


def values(network):
    return {parameter.unique().item() for parameter in network.parameters()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1 + 2 + 4 + 8 + 16) / 5),
        ({"start_epoch": 2}, (4 + 8 + 16) / 3),
        ({"every": 2}, (1 + 4 + 16) / 3),
        ({"start_epoch": 1, "every": 3}, (2 + 16) / 2),
    ],
    ids=str,
)
def test_swa_is_the_arithmetic_mean_of_the_epochs_that_count(settings, expected):
    live = bound(SWA(**settings), build("normed").double())
    epochs(live, [1.0, 2.0, 4.0, 8.0, 16.0], [(x.double(), y) for x, y in BATCHES])
    for value in values(live.deployed()):
        assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", ["gowal", "none"])
def test_ema_is_the_recursion_of_its_formula(warmup):
    live = bound(EMA(decay=0.2, warmup=warmup), build("normed").double())
    average = 1.0
    for t, w in enumerate((2.0, 4.0, 8.0, 16.0), start=1):
        d = min(0.2, (1 + t) / (10 + t)) if warmup == "gowal" else 0.2
        average = d * average + (1 - d) * w
    epochs(live, [1.0, 2.0, 4.0, 8.0, 16.0])
    for value in values(live.deployed()):
        assert value == pytest.approx(average, rel=1e-12)


def test_ema_begins_with_start_epoch():
    live = bound(EMA(start_epoch=2, decay=0.9))
    epochs(live, [1.0, 2.0])
    assert live.deployed() is live.model
    epochs(live, [1.0, 2.0, 4.0])
    assert values(live.deployed()) == {4.0}


@pytest.mark.parametrize("method", [SWA(), EMA()], ids=["swa", "ema"])
def test_the_average_of_constant_weights_is_these_weights_to_the_bit(method):
    live = bound(method)
    epochs(live, [0.3] * 4)
    assert values(live.deployed()) == {torch.tensor(0.3).item()}


def test_ema_without_decay_is_a_copy_that_shares_no_memory():
    live = bound(EMA(decay=0))
    train(live, 2)
    average, model = live.deployed().state_dict(), live.model.state_dict()
    assert average.keys() == model.keys()
    assert all(same(average[name], model[name]) for name in model)
    assert all(average[name].data_ptr() != model[name].data_ptr() for name in model)


@pytest.mark.parametrize("method", [SWA(start_epoch=1), EMA()], ids=["swa", "ema"])
def test_training_does_not_notice_the_average(method):
    plain, averaged = build("dropouts"), build("dropouts")
    torch.manual_seed(3)
    wanted = train(stack(PGDAT()).bind(plain, attack=PGD2), 3)
    after = torch.get_rng_state()
    live = bound(method, averaged)
    torch.manual_seed(3)
    assert all(map(same, train(live, 3), wanted))
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(same, averaged.state_dict().values(), plain.state_dict().values()))
    assert not same(live.deployed().conv.weight, averaged.conv.weight)


def test_the_network_to_keep_is_the_model_until_there_is_an_average():
    live = bound(SWA(start_epoch=1))
    train(live, 1)
    assert live.deployed() is live.model
    train(live, 1, first=1)
    network = live.deployed()
    assert network is not live.model
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_what_clat_has_frozen_may_train_in_the_network_to_keep():
    live = stack(PGDAT(), CLAT(k=1), SWA()).bind(build("normed"), attack=PGD2)
    train(live, 1)
    assert not all(p.requires_grad for p in live.model.parameters())
    assert all(p.requires_grad for p in live.deployed().parameters())


def test_reestimated_statistics_are_the_mean_and_variance_of_the_data_under_the_average():
    live = bound(SWA(), build("normed").double())
    batches = [(x.double(), y) for x, y in BATCHES]
    live.model.conv1.weight.data.mul_(3)  # what the running statistics of the model know nothing of
    live.epoch_end(iter(batches))
    network = live.deployed()
    features = [network.conv1(x) for x, _ in batches]
    torch.testing.assert_close(network.bn1.running_mean, torch.cat(features).mean(dim=(0, 2, 3)))
    unbiased = torch.stack([f.transpose(0, 1).flatten(1).var(dim=1) for f in features]).mean(dim=0)
    torch.testing.assert_close(network.bn1.running_var, unbiased)
    assert network.bn1.momentum == 0.1


def test_a_smaller_last_batch_does_not_enter_the_statistics():
    with_rest, without = bound(SWA()), bound(SWA())
    with_rest.epoch_end(iter([*BATCHES, (torch.ones(1, 3, 8, 8), Y[:1])]))
    without.epoch_end(iter(BATCHES))
    assert all(map(same, with_rest.deployed().buffers(), without.deployed().buffers()))


def test_whole_batches_of_a_loader_are_read_too():
    tuples, named = bound(SWA()), bound(SWA())
    tuples.epoch_end(iter(BATCHES))
    named.epoch_end(Batch(x, y) for x, y in BATCHES)
    assert same(tuples.deployed().bn1.running_mean, named.deployed().bn1.running_mean)


class DropoutThenNorm(nn.Module):
    """Statistics that depend on what dropout draws."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.drop(self.conv(x))).mean(dim=(2, 3))


def test_reestimation_draws_from_a_stream_of_its_own_and_leaves_the_global_one():
    model, means = DropoutThenNorm(), []
    for seed in (1, 2):
        live = bound(SWA(), model)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        live.epoch_end(iter(BATCHES))
        assert torch.equal(torch.get_rng_state(), before)
        means.append(live.deployed().bn.running_mean)
    assert same(*means)


def unreadable():
    raise AssertionError("no image is to be read")
    yield


@pytest.mark.parametrize(
    ("method", "network"),
    [(SWA(), "dropouts"), (SWA(norm_stats="copy"), "normed"), (SWA(start_epoch=1), "normed"), (EMA(), "normed")],
    ids=["no batch norm", "copied statistics", "not begun", "ema by default"],
)
def test_no_image_is_read_that_is_not_needed(method, network):
    live = bound(method, build(network))
    live.epoch_start(0)
    live.step_end()
    live.epoch_end(unreadable())


@pytest.mark.parametrize("method", [SWA(norm_stats="copy"), EMA()], ids=["swa", "ema"])
def test_copied_statistics_are_those_of_the_model_at_the_last_average(method):
    live = bound(method)
    train(live, 2)
    assert all(map(same, live.deployed().buffers(), live.model.buffers()))


def test_ema_reestimates_after_an_epoch_where_that_is_wanted():
    live = bound(EMA(norm_stats="reestimate", decay=0))
    train(live, 1)
    swa = bound(SWA(), deepcopy(live.model))
    swa.epoch_end(iter(BATCHES))
    assert same(live.deployed().bn2.running_var, swa.deployed().bn2.running_var)
    assert not same(live.deployed().bn2.running_var, live.model.bn2.running_var)


class Adapted(LiveWrapper):
    """Deploys another network than it trains, as adapters do."""

    def deployed(self):
        plain = deepcopy(self.model)
        fill(plain, 10 * self.model.conv1.weight.max().item())
        return plain


@pytest.mark.parametrize(("method", "expected"), [(SWA(), 20.0), (EMA(decay=0), 30.0)], ids=["swa", "ema"])
def test_what_enters_the_average_is_what_the_inner_method_would_deploy(method, expected):
    model = build("normed")
    live = bound(method, model, inner=Adapted(stack(PGDAT()).bind(model, attack=PGD2)))
    epochs(live, [1.0, 3.0])
    assert values(live.deployed()) == {expected}


@pytest.mark.parametrize("method", [SWA(start_epoch=1, every=2), EMA(decay=0.7)], ids=["swa", "ema"])
@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_goes_on_to_the_bit(method, done):
    live = bound(method)
    train(live, done)
    file = io.BytesIO()
    torch.save({"live": live.state_dict(), "model": live.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = bound(method, build("normed", seed=1))
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["live"])
    assert (live.deployed() is live.model) == (resumed.deployed() is resumed.model)
    for one in (live, resumed):
        one.epoch_end(iter(BATCHES))  # a run may be cut right before it
        train(one, 3, first=done)
    assert all(map(same, live.deployed().state_dict().values(), resumed.deployed().state_dict().values()))


def test_a_state_from_before_the_average_takes_it_away():
    live = bound(SWA())
    state = live.state_dict()
    train(live, 1)
    live.load_state_dict(state)
    assert live.deployed() is live.model


@pytest.mark.parametrize("average", [SWA(), EMA()], ids=["swa", "ema"])
@pytest.mark.parametrize("place", [1, 2], ids=["inside clat", "around clat"])
def test_it_goes_with_clat_on_either_side(average, place):
    methods = [PGDAT(), CLAT(k=1, start_epoch=1)]
    methods.insert(place, average)
    plain = build("normed")
    wanted = train(stack(PGDAT(), CLAT(k=1, start_epoch=1)).bind(plain, attack=PGD2), 2)
    live = stack(*methods).bind(build("normed"), attack=PGD2)
    assert all(map(same, train(live, 2), wanted))
    assert live.deployed() is not live.model
    assert torch.isfinite(live.deployed()(X)).all()


class NoRead(TorchDispatchMode):
    """Refuses to hand a value to Python, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_ema_step_does_not_wait_for_the_device():
    live = bound(EMA())
    with NoRead():
        live.step_end()
        live.step_end()
    with pytest.raises(AssertionError), NoRead():
        float(X.sum())


def test_labels_stand_in_the_row_label():
    assert stack(PGDAT(), SWA(), CLAT(k=1)).label == "PGD-AT + SWA + CLAT"
    assert stack(PGDAT(), EMA()).label == "PGD-AT + EMA"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (SWA, {"start_epoch": -1}, "swa start_epoch is -1; it must be >= 0"),
        (SWA, {"every": 0}, "swa every is 0; it must be at least 1 epoch"),
        (SWA, {"norm_stats": "recompute"}, "unknown swa norm_stats 'recompute'"),
        (EMA, {"decay": 1.0}, r"ema decay is 1\.0; it must be in \[0, 1\)"),
        (EMA, {"warmup": "linear"}, "unknown ema warmup 'linear'"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(method, settings, message):
    with pytest.raises(InputError, match=message):
        method(**settings)


def test_two_averages_do_not_go_together():
    with pytest.raises(InputError, match="SWA does not go with EMA: both say which network is evaluated"):
        stack(PGDAT(), SWA(), EMA())


def test_an_average_needs_an_inner_method():
    with pytest.raises(InputError, match="EMA stands alone but it only changes the training of another method"):
        stack(EMA())
    with pytest.raises(InputError, match=r"use stack\(PGDAT\(\), SWA\(\.\.\.\)\)"):
        SWA().bind(build("normed"), attack=PGD2)


def test_without_images_the_error_says_what_is_missing():
    with pytest.raises(InputError, match=r"SWA re-estimates batch-norm statistics .* pass the training images"):
        bound(SWA()).epoch_end(())
