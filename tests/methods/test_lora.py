"""LoRA: what trains and when, what is deployed, and CLAT, AWP and averages around it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from as_found import same
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.layers.low_rank import adapters, originals
from toughen.methods import AWP, CLAT, EMA, SWA, LoRA, RiFT, stack
from toughen.objectives import METHODS, PGDAT, AutoLoRA
from toughen.types import Batch, ThreatModel
from zoo import build, images

X, Y = images(8)
PROBE = [(X, Y)]
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
ONE = CLAT(k=1, select="fixed", layers=("conv2",), base="inner", lam=0.0)


def bound(model, *outer, **settings):
    return stack(PGDAT(), LoRA(**{"rank": 2, **settings}), *outer).bind(model, attack=PGD2)


def sgd(live):
    return torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)


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


def factors(model, *names):
    return {f"{name}.parametrizations.weight.0.{side}" for name in names or adapters(model) for side in "ab"}


def test_binding_changes_no_output_bit_and_the_first_loss_is_that_of_the_inner_method():
    model = build("normed").eval()
    plain = copy.deepcopy(model)
    live = bound(model, norm_stats="update")
    assert same(model(X).detach(), plain(X).detach())
    assert same(live(X, Y).loss, PGDAT().bind(plain, attack=PGD2)(X, Y).loss)


@pytest.mark.parametrize(
    ("settings", "further"),
    [
        ({"norm_affine": "frozen"}, set()),
        ({}, {f"{norm}.{kind}" for norm in ("bn1", "bn2") for kind in ("weight", "bias")}),
        ({"norm_affine": "frozen", "classifier": "train"}, {"head.fc.weight", "head.fc.bias"}),
        (
            {"norm_affine": "frozen", "norm_stats": "update"},
            {
                f"{norm}.{kind}"
                for norm in ("bn1", "bn2")
                for kind in ("running_mean", "running_var", "num_batches_tracked")
            },
        ),
    ],
    ids=["factors alone", "affine", "classifier", "statistics"],
)
def test_steps_change_the_factors_and_what_the_settings_name_and_nothing_else(settings, further):
    model = build("normed")
    live = bound(model, **settings)
    optimizer = sgd(live)
    live.epoch_start(0, PROBE)
    before = state(model)
    steps(live, optimizer)
    assert changed(model, before) == factors(model, "conv1", "conv2", "conv3") | further
    assert {n for n, p in live.named_parameters().items() if p.grad is not None} == {
        n for n in changed(model, before) if "running" not in n and "num" not in n
    }


def test_the_classifier_may_be_adapted_by_name_and_then_its_bias_alone_can_train_beside():
    model = build("normed")
    live = bound(model, layers=("head.*", "conv2"), norm_affine="frozen", classifier="train")
    optimizer = sgd(live)
    live.epoch_start(0, PROBE)
    before = state(model)
    steps(live, optimizer)
    assert changed(model, before) == factors(model, "head.fc", "conv2") | {"head.fc.bias"}
    assert set(live.selected) == {"head.fc", "conv2"}


def test_before_it_starts_the_weights_train_and_the_adapters_do_not():
    model, reference = build("normed"), build("normed")
    live, alone = bound(model, start_epoch=1), PGDAT().bind(reference, attack=PGD2)
    optimizer = sgd(live)
    live.epoch_start(0)
    assert live.selected is None
    expected = steps(alone, sgd(alone))
    assert all(same(a, b) for a, b in zip(steps(live, optimizer), expected, strict=True))
    assert all(same(value, reference.state_dict()[n]) for n, value in live.deployed().state_dict().items())
    live.epoch_start(1)
    assert live.selected == ("conv1", "conv2", "conv3")
    before = state(model)
    steps(live, optimizer)  # momentum of the weights must not coast on
    assert changed(model, before) & {f"{name}.parametrizations.weight.original" for name in adapters(model)} == set()
    assert factors(model) <= changed(model, before)


def test_the_gradient_of_the_factors_is_that_of_the_formula():
    model = build("normed").double()
    live = bound(model, alpha=3.0)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.b.normal_(generator=torch.Generator().manual_seed(1))
    adv = live.perturb(Batch(X.double(), Y), generator=torch.Generator())
    live.loss(adv).loss.backward()
    found = adapters(model)["conv2"]
    plain = live.deployed().train()
    plain.bn1.eval()
    plain.bn2.eval()
    F.cross_entropy(plain(adv.x_adv), Y).backward()
    outside = 1.5 * plain.conv2.weight.grad.reshape(found.b.shape[0], found.a.shape[1])
    torch.testing.assert_close(found.b.grad, outside @ found.a.detach().T)
    torch.testing.assert_close(found.a.grad, found.b.detach().T @ outside)


def test_what_is_deployed_is_plain_and_computes_the_same_bit_for_bit():
    plain = build("normed")
    model = copy.deepcopy(plain)
    live = bound(model)
    steps(live, sgd(live))
    before = state(model)
    network = live.deployed().eval()
    assert list(network.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in network.parameters())
    assert same(network(X).detach(), model.eval()(X).detach())
    assert changed(model, before) == set()
    assert not same(network.conv1.weight, plain.conv1.weight)


def test_release_merges_and_lets_everything_train_again_but_what_was_frozen_before():
    model = build("normed").train()
    model.conv3.weight.requires_grad_(False)
    model.bn2.bias.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    live = bound(model)
    assert set(adapters(model)) == {"conv1", "conv2"}
    steps(live, sgd(live))
    assert not model.bn1.training
    network = live.deployed()
    live.release()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert all(same(value, network.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert live.deployed() is model


def test_what_was_frozen_before_binding_stays_frozen():
    model = build("normed")
    model.bn2.bias.requires_grad_(False)
    model.conv3.weight.requires_grad_(False)
    live = bound(model)
    before = state(model)
    steps(live, sgd(live))
    assert changed(model, before) & {"bn2.bias", "conv3.weight"} == set()


def test_under_clat_the_adapters_of_the_critical_layers_train_alone():
    for settings in ({}, {"base": "clean_ce", "lam": 0.1}):
        model = build("normed")
        clat = CLAT(k=1, select="fixed", layers=("conv2",), start_epoch=1, **{"base": "inner", "lam": 0.0, **settings})
        live = bound(model, clat)
        optimizer = sgd(live)
        live.epoch_start(0, PROBE, optimizer=optimizer)
        steps(live, optimizer)
        for epoch in (1, 2):
            live.epoch_start(epoch, PROBE, optimizer=optimizer)
            before = state(model)
            steps(live, optimizer)
            assert changed(model, before) == factors(model, "conv2")
        assert live.selected == ("conv2",)
        live.release()
        assert all(p.requires_grad for p in model.parameters())
        assert list(model.state_dict()) == list(build("normed").state_dict())


def test_the_same_is_so_where_both_begin_in_a_later_epoch():
    model = build("normed")
    live = bound(model, CLAT(k=1, start_epoch=1, base="inner", lam=0.0), start_epoch=1)
    optimizer = sgd(live)
    live.epoch_start(0, PROBE)
    steps(live, optimizer)
    live.epoch_start(1, PROBE)
    before = state(model)
    steps(live, optimizer)
    assert changed(model, before) == factors(model, *live.selected)


def test_clat_chooses_among_the_layers_that_have_something_to_train():
    model = build("normed")
    clat = CLAT(k=2, classifier="include", base="inner", lam=0.0)
    live = bound(model, clat, layers=("conv1", "conv3"))
    live.epoch_start(0, PROBE)
    assert set(live.selected) == {"conv1", "conv3"}
    steps(live, sgd(live))
    with pytest.raises(InputError, match="clat layer 'conv2' is frozen before CLAT selects it"):
        bound(build("normed"), ONE, layers=("conv1",)).epoch_start(0, PROBE)


def test_a_state_from_before_both_began_lets_the_weights_train_again_under_clat():
    model = build("normed")
    live = bound(model, CLAT(k=1, start_epoch=1, base="inner", lam=0.0), start_epoch=1)
    saved = live.state_dict()
    live.epoch_start(1, PROBE)
    live.load_state_dict(saved)
    assert all(p.requires_grad for p in originals(model).values())
    assert not any(p.requires_grad for adapter in adapters(model).values() for p in adapter.parameters())


def test_averages_hold_the_plain_weights():
    model = build("normed")
    live = bound(model, SWA(norm_stats="copy"))
    optimizer, seen = sgd(live), []
    for epoch in range(2):
        live.epoch_start(epoch)
        steps(live, optimizer)
        live.epoch_end(PROBE)
        seen.append(live.inner.deployed().conv1.weight.detach())
    torch.testing.assert_close(live.deployed().conv1.weight, (seen[0] + seen[1]) / 2)
    live = bound(build("normed"), EMA(decay=0.0))
    steps(live, sgd(live))
    torch.testing.assert_close(live.deployed().conv1.weight, live.inner.deployed().conv1.weight)


def test_behind_it_awp_moves_the_factors():
    model = build("normed")
    live = bound(model, AWP(gamma=0.5), norm_affine="frozen")
    optimizer = sgd(live)
    steps(live, optimizer, 1)
    before = state(model)
    plain = bound(copy.deepcopy(live.deployed()))
    assert not same(live(X, Y).loss, plain(X, Y).loss)
    assert changed(model, before) == set()
    steps(live, optimizer)
    assert changed(model, before) == factors(model)


@pytest.mark.parametrize(
    "outer",
    [(), (ONE,), (ONE, SWA(norm_stats="copy")), (ONE, AWP(), EMA())],
    ids=["alone", "CLAT", "CLAT + SWA", "CLAT + AWP + EMA"],
)
def test_a_resumed_run_continues_bit_identically(outer):
    model = build("normed")
    live = bound(model, *outer, classifier="train")
    optimizer = sgd(live)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    steps(live, optimizer)
    live.epoch_end(PROBE)
    file = io.BytesIO()
    torch.save((model.state_dict(), live.state_dict(), optimizer.state_dict()), file)
    expected = steps(live, optimizer)

    file.seek(0)
    weights, saved, momentum = torch.load(file, weights_only=True)
    fresh = build("normed", seed=1)
    again = bound(fresh, *outer, classifier="train")
    optimizer = sgd(again)
    fresh.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    again.load_state_dict(saved)
    assert again.selected == live.selected
    assert all(same(a, b) for a, b in zip(steps(again, optimizer), expected, strict=True))
    assert all(same(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_run_resumed_before_it_starts_waits():
    model = build("normed")
    live = bound(model, start_epoch=1)
    saved = live.state_dict()
    live.epoch_start(1)
    live.load_state_dict(saved)
    assert all(p.requires_grad for p in originals(model).values())
    assert not any(p.requires_grad for adapter in adapters(model).values() for p in adapter.parameters())


def test_the_label_is_that_of_the_papers_row():
    assert stack(PGDAT(), LoRA(), ONE).label == "PGD-AT + LoRA + CLAT (inner loss)"
    assert METHODS["lora"] is LoRA


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora rank is 0; it must be at least 1"),
        ({"alpha": -1.0}, "lora alpha is -1.0; it must be a finite number > 0, or null for rank"),
        ({"start_epoch": -1}, "lora start_epoch is -1; it must be >= 0"),
        ({"form": "2x2"}, "unknown lora form '2x2'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LoRA(**settings)


def test_a_stack_in_which_clat_would_choose_what_lora_freezes_is_refused():
    message = "CLAT begins at epoch 2 and LoRA at 5.*set clat start_epoch >= 5, or lora start_epoch <= 2"
    with pytest.raises(InputError, match=message):
        stack(PGDAT(), LoRA(start_epoch=5), CLAT(k=1, start_epoch=2))
    stack(PGDAT(), LoRA(start_epoch=5), CLAT(k=1, start_epoch=5))


@pytest.mark.parametrize("norm_stats", ["follow", "update"])
def test_a_clat_whose_statistics_it_would_hold_is_refused(norm_stats):
    clat = CLAT(select="fixed", layers=("conv1",), base="inner", norm_stats=norm_stats)
    with pytest.raises(InputError, match=f"norm_stats='{norm_stats}' and LoRA 'frozen'.*lora norm_stats='update'"):
        stack(PGDAT(), LoRA(), clat)
    model = build("normed")
    live = stack(PGDAT(), LoRA(rank=2, norm_stats="update"), clat).bind(model, attack=PGD2)
    live.epoch_start(0, PROBE)
    before = state(model)
    steps(live, sgd(live))
    assert "bn1.running_mean" in changed(model, before)
    stack(PGDAT(), LoRA(), CLAT(k=1, norm_stats=norm_stats))  # with a loss of its own LoRA's does not run


@pytest.mark.parametrize("outer", [CLAT(k=1), SWA(), EMA()])
def test_it_stands_before_what_needs_its_adapters_or_averages_them(outer):
    with pytest.raises(InputError, match=f"LoRA stands behind {outer.label}"):
        stack(PGDAT(), outer, LoRA())


def test_it_does_not_go_with_other_tunings_of_the_same_weights():
    with pytest.raises(InputError, match=r"AutoLoRA does not go with LoRA|LoRA does not go with AutoLoRA"):
        stack(AutoLoRA(), LoRA())
    with pytest.raises(InputError, match="LoRA does not go with RiFT"):
        stack(PGDAT(), LoRA(), RiFT())


def test_what_it_can_not_adapt_is_refused():
    with pytest.raises(InputError, match=r"unknown lora layer pattern 'convv\*'; did you mean 'conv.'"):
        bound(build("normed"), layers=("convv*",))
    with pytest.raises(InputError, match=r"lora adapts convolutions, and Sequential has none.*layers=\('\*',\)"):
        bound(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(InputError, match=r"LoRA stands alone .* use stack\(PGDAT\(\), LoRA\(...\)\)"):
        LoRA().bind(build("normed"), attack=PGD2)


def test_a_classifier_that_can_not_be_found_is_refused():
    with pytest.raises(InputError, match="lora has to find the classifier but the probe is empty"):
        bound(build("normed"), classifier="train").epoch_start(0)
    headless = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(6), nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Flatten(2))
    model = nn.Sequential(headless, nn.AdaptiveAvgPool1d(2), nn.Flatten())
    live = bound(model, classifier="train", start_epoch=50)
    with pytest.raises(InputError, match="no layer of Sequential returns its logits; set it to 'frozen'"):
        live.check(X[:1])  # not only when it starts
    with pytest.raises(InputError, match="no layer of Sequential returns its logits"):
        live.epoch_start(50, PROBE)
