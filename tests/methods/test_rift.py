"""RiFT: which module it tunes, what stays, which network between start and end it deploys."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from as_found import same
from toughen.attacks import PGD
from toughen.criticality.module_robustness import module_robustness
from toughen.errors import InputError
from toughen.methods import AWP, CLAT, EMA, SWA, TWINS, LoRA, RiFT, stack
from toughen.methods.interpolation import Interpolation, interpolated, measure_path
from toughen.objectives import METHODS, PGDAT, AutoLoRA, CleanCE
from toughen.rng import generator, stream_seed
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(16)
PROBE = [(X[:8], Y[:8]), (X[8:], Y[8:])]
PGD2 = PGD(ThreatModel(eps=0.05), step_size=0.025, steps=2)
FAST = {"mrc_epochs": 1, "samples": 16}
STATISTICS = {
    f"{norm}.{kind}" for norm in ("bn1", "bn2") for kind in ("running_mean", "running_var", "num_batches_tracked")
}


def bound(model, *inner, **settings):
    return stack(*(inner or (PGDAT(),)), RiFT(**FAST | settings)).bind(model, attack=PGD2)


def tuned(model=None, *inner, count=3, **settings):
    """A live method that has fine-tuned for some steps, and the state that it began with."""
    live = bound(model or build("normed"), *inner, **settings)
    before = state(live.model)
    live.epoch_start(0, PROBE)
    steps(live, sgd(live), count)
    return live, before


def sgd(live, lr=0.1):
    return torch.optim.SGD(live.parameters(), lr=lr, momentum=0.9, weight_decay=0.05)


def steps(live, optimizer, count=2):
    losses = []
    live.model.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss = live(X, Y).loss
        loss.backward()
        optimizer.step()
        live.step_end()
        losses.append(loss.detach())
    return losses


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not same(value, before[name])}


def owned(name):
    return {n for n in build("normed").state_dict() if n.startswith(f"{name}.")}


# -- what trains -------------------------------------------------------------------------------------


def test_it_tunes_the_module_with_the_lowest_criticality_on_the_first_images_of_the_probe():
    model = build("normed")
    report = module_robustness(model, [(X[:8], Y[:8]), (X[8:12], Y[8:12])], PGD2, epochs=2, seed=stream_seed(0, "rift"))
    live = bound(model, samples=12, mrc_epochs=2)
    assert live.probe_size == 12
    assert live.epoch_start(0, [*PROBE, (torch.full_like(X, float("nan")), Y)]) is None
    assert live.mrc == {row.name: row.mrc for row in report.rows}
    assert live.selected == (report.chosen.name,)
    assert live.facts() == {"mrc": report.chosen.mrc}
    assert live.probe_size == 0


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        ({}, STATISTICS),
        ({"norm_stats": "frozen"}, set()),
        ({"norm_stats": "follow", "layer": "conv1"}, {name for name in STATISTICS if "bn1" in name}),
    ],
)
def test_one_module_changes_and_the_batch_statistics_that_the_settings_name(settings, moving):
    live, before = tuned(**settings)
    (name,) = live.selected
    assert changed(live.model, before) == owned(name) | moving
    assert {n for n, p in live.named_parameters().items() if p.grad is not None} == owned(name)


def test_it_minimises_clean_cross_entropy():
    model = build("normed").double()
    live = bound(model, layer="conv2")
    live.epoch_start(0, [(X.double(), Y)])
    reference = copy.deepcopy(model)
    expected = F.cross_entropy(reference(X.double()), Y)
    expected.backward()
    output = live(X.double(), Y)
    output.loss.backward()
    assert set(output.terms) == {"clean_ce"}
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model.conv2.weight.grad, reference.conv2.weight.grad)


def test_a_named_module_is_not_measured_and_every_module_is_known_by_its_whole_name():
    live = bound(build("resnet18"), layer="layer1.0.conv1")
    assert live.probe_size == 1
    live.epoch_start(0, [(X[:1], Y[:1])])
    assert live.mrc == live.facts() == {}
    assert {n for n, p in live.named_parameters().items() if p.requires_grad} == {"layer1.0.conv1.weight"}


def test_until_it_starts_it_is_its_inner_method():
    model, reference = build("normed"), build("normed")
    live, alone = bound(model, start_epoch=1), PGDAT().bind(reference, attack=PGD2)
    optimizer = sgd(live)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    assert (live.selected, live.lr_scale, live.schedule_start, live.facts()) == (None, 1.0, 0, {})
    expected = steps(alone, sgd(alone))
    assert all(same(a, b) for a, b in zip(steps(live, optimizer), expected, strict=True))
    assert live.deployed() is model
    live.finish([])  # nothing to choose between
    assert live.alpha is None
    live.epoch_start(1, PROBE, optimizer=optimizer)
    assert not optimizer.state
    assert live.lr_scale == 0.01
    before = state(model)
    steps(live, optimizer)
    assert changed(model, before) == owned(live.selected[0]) | STATISTICS


def test_the_schedule_goes_on_or_starts_again():
    for lr, expected in (("continue", 0), ("restart", 2)):
        live = bound(build("normed"), start_epoch=2, lr=lr, lr_scale=0.5)
        live.epoch_start(1, PROBE)
        live.epoch_start(2, PROBE)
        assert (live.schedule_start, live.lr_scale) == (expected, 0.5)


def test_what_clat_froze_may_be_tuned_and_clat_selects_no_more():
    model = build("normed")
    clat = CLAT(k=1, select="fixed", layers=("conv1",), every=1)
    live = bound(model, PGDAT(), clat, start_epoch=1, layer="conv3")
    optimizer = sgd(live)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    steps(live, optimizer)
    assert live.selected == ("conv1",)
    for epoch in (1, 2):
        assert live.epoch_start(epoch, PROBE, optimizer=optimizer) is None
        before = state(model)
        steps(live, optimizer)
        assert changed(model, before) == owned("conv3") | STATISTICS
    live.finish(PROBE)
    live.release()
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_parameters_of_the_inner_method_stay_where_they_are():
    live = bound(build("normed"), PGDAT(), TWINS(), start_epoch=1)
    optimizer = sgd(live)
    live.epoch_start(0, PROBE)
    steps(live, optimizer)
    live.epoch_start(1, PROBE)
    before = {name: p.detach().clone() for name, p in live.own_parameters().items()}
    steps(live, optimizer)
    assert before
    assert all(same(p.detach(), before[name]) for name, p in live.own_parameters().items())


def test_a_module_that_was_frozen_before_binding_is_not_chosen():
    model = build("normed")
    for name in ("conv1", "conv3"):
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(False)
    live = bound(model)
    live.epoch_start(0, PROBE)
    assert set(live.mrc) == {"conv2", "head.fc"}


# -- what is deployed --------------------------------------------------------------------------------


def test_at_0_it_is_the_start_and_at_1_the_end_bit_for_bit_and_between_them_a_straight_line():
    live, start = tuned()
    end = state(live.model)
    for alpha, expected in ((0.0, start), (1.0, end)):
        assert all(same(value, expected[name]) for name, value in interpolated(start, end, alpha).items())
    for name, value in interpolated(start, end, 0.3).items():
        if name.endswith("tracked"):
            assert value == end[name]
        else:
            torch.testing.assert_close(value, 0.7 * start[name] + 0.3 * end[name])
        if name not in changed(live.model, start):
            assert same(value, start[name])


def test_the_accuracies_on_the_way_are_those_of_the_networks():
    live, start = tuned(lr_scale=1.0, count=6)
    live.finish(iter(PROBE))  # may be read once only
    for point in live.path[::5]:
        network = build("normed").eval()
        network.load_state_dict(interpolated(start, live.model.state_dict(), point.alpha))
        clean = robust = 0
        for number, (x, y) in enumerate(PROBE):
            right = network(x).argmax(1) == y
            x_adv = PGD2(network, x, y, generator=generator(0, "interpolation", number))
            clean, robust = clean + int(right.sum()), robust + int((right & (network(x_adv).argmax(1) == y)).sum())
        assert point == Interpolation(point.alpha, clean / 16, robust / 16)
    assert [point.alpha for point in live.path] == [number / 10 for number in range(11)]


@pytest.mark.parametrize(
    ("drop", "points", "expected"),
    [
        (0.001, [(0.5, 0.3), (0.6, 0.299), (0.7, 0.298)], 0.1),  # 0.001 is allowed, although 0.3 - 0.299 is a bit more
        (0.0, [(0.5, 0.3), (0.6, 0.299), (0.55, 0.31)], 0.2),
        (0.0, [(0.5, 0.3), (0.4, 0.4), (0.45, 0.3)], 0.0),
        (1.0, [(0.5, 0.3), (0.6, 0.0), (0.7, 0.0)], 0.2),
        (0.1, [(0.5, 0.3), (0.6, 0.25), (0.6, 0.28), (0.6, 0.28)], 0.2),
    ],
)
def test_the_most_accurate_network_is_deployed_that_loses_no_more_than_allowed(drop, points, expected, monkeypatch):
    live, start = tuned(drop=drop)
    path = tuple(Interpolation(number / 10, *point) for number, point in enumerate(points))
    monkeypatch.setattr("toughen.methods.rift.measure_path", lambda *_, **__: path)
    end = state(live.model)
    live.finish(PROBE)
    assert live.facts()["alpha"] == expected
    deployed = live.deployed()
    assert deployed is not live.model
    assert all(same(value, end[name]) for name, value in live.model.state_dict().items())
    wanted = interpolated(start, end, expected)
    assert all(same(value, wanted[name]) for name, value in deployed.state_dict().items())
    assert all(p.requires_grad for p in deployed.parameters())


def test_finishing_twice_chooses_the_same_and_going_on_deploys_what_trains():
    live, _ = tuned()
    found = []
    for _ in range(2):
        live.finish(PROBE)
        found.append((live.alpha, live.path, state(live.deployed())))
    assert found[0][:2] == found[1][:2]
    assert all(same(value, found[0][2][name]) for name, value in found[1][2].items())
    live.epoch_start(1)
    assert live.deployed() is live.model
    assert "alpha" not in live.facts()


def test_the_network_that_is_measured_on_the_way_ends_as_it_began():
    live, start = tuned()
    network = copy.deepcopy(live.model).eval()
    measure_path(network, start, PROBE, PGD2)
    assert changed(network, live.model.state_dict()) == set()


# -- resuming, composing, refusing -------------------------------------------------------------------


@pytest.mark.parametrize("inner", [(PGDAT(),), (PGDAT(), CLAT(k=1, base="inner", lam=0.0))], ids=["PGD-AT", "CLAT"])
def test_a_resumed_run_continues_bit_identically_and_deploys_the_same(inner):
    def made(model):
        live = bound(model, *inner, start_epoch=1)
        return live, sgd(live)

    live, optimizer = made(build("normed"))
    for epoch in range(2):
        live.epoch_start(epoch, PROBE, optimizer=optimizer)
        steps(live, optimizer)
    file = io.BytesIO()
    torch.save((live.model.state_dict(), live.state_dict(), optimizer.state_dict()), file)
    expected = steps(live, optimizer)
    live.finish(PROBE)

    file.seek(0)
    weights, saved, momentum = torch.load(file, weights_only=True)
    again, optimizer = made(build("normed", seed=1))
    again.model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    again.load_state_dict(saved)
    assert (again.selected, again.mrc) == (live.selected, live.mrc)
    assert all(same(a, b) for a, b in zip(steps(again, optimizer), expected, strict=True))
    again.finish(PROBE)
    assert (again.alpha, again.path) == (live.alpha, live.path)
    assert changed(again.deployed(), live.deployed().state_dict()) == set()

    last, _ = made(build("normed", seed=2))  # a checkpoint of after the end deploys what was chosen
    last.model.load_state_dict(live.model.state_dict())
    last.load_state_dict(live.state_dict())
    assert changed(last.deployed(), live.deployed().state_dict()) == set()
    assert last.facts() == live.facts()


def test_a_state_from_before_the_start_lets_everything_train_again():
    live = bound(build("normed"), start_epoch=1)
    saved = live.state_dict()
    live.epoch_start(1, PROBE)
    live.load_state_dict(saved)
    assert all(p.requires_grad for p in live.model.parameters())
    assert set(live(X, Y).terms) == {"adv_ce"}


def test_so_it_does_with_the_parameters_of_the_inner_method():
    live = bound(build("normed"), PGDAT(), TWINS(), start_epoch=1)
    saved = live.state_dict()
    live.epoch_start(1, PROBE)
    assert not any(p.requires_grad for p in live.own_parameters().values())
    live.load_state_dict(saved)
    assert all(p.requires_grad for p in live.own_parameters().values())


def test_the_label_is_that_of_the_papers_row():
    assert stack(PGDAT(), CLAT(k=1), RiFT(start_epoch=1)).label == "PGD-AT + CLAT + RiFT"
    assert METHODS["rift"] is RiFT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "rift eps is 0.0; it must be a finite number > 0"),
        ({"mrc_epochs": 0}, "rift mrc_epochs is 0; it must be at least 1"),
        ({"samples": 0}, "rift samples is 0; it must be at least 1"),
        ({"start_epoch": -1}, "rift start_epoch is -1; it must be >= 0"),
        ({"drop": 1.5}, "rift drop is 1.5; it must be in"),
        ({"lr_scale": -1.0}, "rift lr_scale is -1.0; it must be a finite number >= 0"),
        ({"norm_stats": "none"}, "unknown rift norm_stats 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RiFT(**settings)


@pytest.mark.parametrize("other", [SWA(), EMA(), LoRA()])
def test_it_does_not_go_with_what_deploys_another_network_or_trains_other_weights(other):
    with pytest.raises(InputError, match=f"{other.label} does not go with RiFT"):
        stack(PGDAT(), other, RiFT())
    with pytest.raises(InputError, match=f"RiFT does not go with {other.label}"):
        stack(PGDAT(), RiFT(), other)


def test_it_does_not_go_with_autolora():
    with pytest.raises(InputError, match="RiFT does not go with AutoLoRA"):
        stack(AutoLoRA(), RiFT())


@pytest.mark.parametrize("outer", [CLAT(k=1, start_epoch=2), AWP()])
def test_it_comes_last(outer):
    with pytest.raises(InputError, match=f"RiFT stands before {outer.label}, .* put it last"):
        stack(CleanCE(), RiFT(start_epoch=5), outer)


def test_clat_must_begin_before_it():
    message = "CLAT begins at epoch 3 and RiFT at 3, so CLAT would never act; set rift start_epoch > 3"
    with pytest.raises(InputError, match=message):
        stack(PGDAT(), CLAT(k=1, start_epoch=3), RiFT(start_epoch=3))


def test_what_it_can_not_do_is_refused():
    live = bound(build("normed"))
    with pytest.raises(InputError, match="RiFT has to choose a module but the probe is empty"):
        live.epoch_start(0)
    live.epoch_start(0, PROBE)
    with pytest.raises(InputError, match="no held-out images to choose on"):
        live.finish([])
    with pytest.raises(InputError, match="unknown layer 'conv9'; did you mean 'conv"):
        bound(build("normed"), layer="conv9").check(X[:1])
    bound(build("normed"), layer="conv1").check(X[:1])
    partly = build("normed")
    partly.conv1.requires_grad_(False)
    live = bound(partly, layer="conv1")
    for start in (lambda: live.check(X[:1]), lambda: live.epoch_start(0, PROBE)):
        with pytest.raises(InputError, match="rift layer 'conv1' is frozen, so there is nothing to tune"):
            start()
    with pytest.raises(InputError, match=r"RiFT stands alone .* use stack\(PGDAT\(\), RiFT\(...\)\)"):
        RiFT().bind(nn.Identity(), attack=PGD2)
