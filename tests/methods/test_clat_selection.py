"""When CLAT selects, what it then trains, and what happens to momentum."""

import pytest
import torch
from torch import nn

from as_found import same
from toughen import models
from toughen.attacks import PGD
from toughen.criticality import analyze
from toughen.criticality.selection import Fixed
from toughen.methods import CLAT, stack
from toughen.objectives import PGDAT
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(8)
PROBE = [(X, Y)]
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)


def step(live, optimizer, x=X, y=Y):
    live.model.train()
    optimizer.zero_grad()
    loss = live(x, y).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def names_of(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


class InTurn:
    """A rule that selects the given layers, one set after the other."""

    def __init__(self, *choices):
        self.choices = list(choices)

    def __call__(self, report, k, *, classifier, generator):
        return self.choices.pop(0)


@pytest.mark.parametrize(
    ("start", "every", "expected"), [(0, 10, [0, 10, 20]), (3, 10, [3, 13, 23]), (2, 8, [2, 10, 18])]
)
def test_selections_happen_at_the_start_and_every_so_many_epochs(start, every, expected):
    live = stack(PGDAT(), CLAT(k=1, start_epoch=start, every=every)).bind(build("backwards"), attack=PGD2)
    made = [selection for epoch in range(25) if (selection := live.epoch_start(epoch, PROBE))]
    assert [selection.epoch for selection in made] == expected
    assert all(len(selection.layers) == 1 for selection in made)


def test_without_every_it_selects_once():
    live = CLAT(k=1, every=None).bind(build("backwards"), attack=PGD2)
    assert [epoch for epoch in range(30) if live.epoch_start(epoch, PROBE)] == [0]


def test_it_selects_the_most_critical_layers_of_its_report():
    model = build("nested")
    selection = CLAT(k=2).bind(model, attack=PGD2).epoch_start(0, PROBE)
    assert selection.layers == tuple(row.name for row in selection.report.top(2))
    again = analyze(model, PROBE, PGD2, seed=selection.report.settings["seed"])
    assert again.rows == selection.report.rows


def test_only_the_first_images_of_the_probe_are_used():
    live = CLAT(k=1, probe_size=5).bind(build("backwards"), attack=PGD2)
    batches = [(X[:3], Y[:3]), (X[3:6], Y[3:6]), (torch.full_like(X, float("nan")), Y)]
    assert live.epoch_start(0, batches).report.settings["num_samples"] == 5


def test_without_k_five_percent_of_the_layers_train_and_at_least_one():
    assert len(CLAT().bind(build("backwards"), attack=PGD2).epoch_start(0, PROBE).layers) == 1
    resnet = models.create("resnet18", width=4, num_classes=4, seed=0)
    assert len(CLAT().bind(resnet, attack=PGD2).epoch_start(0, PROBE).layers) == 1
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(40)], nn.Flatten(), nn.Linear(192, 4))
    assert len(CLAT().bind(deep, attack=PGD2).epoch_start(0, PROBE).layers) == 2


def test_fixed_layers_need_no_k():
    for settings in ({"select": "fixed", "layers": ("first", "third")}, {"select": Fixed(("first", "third"))}):
        live = CLAT(**settings).bind(build("backwards"), attack=PGD2)
        assert live.epoch_start(0, PROBE).layers == ("first", "third")
        assert live.selected == ("first", "third")


def test_bottom_and_random_are_controls_that_can_be_repeated():
    def made(select, seed):
        live = CLAT(k=2, select=select, every=1).bind(build("resnet18"), attack=PGD2, seed=seed)
        return [live.epoch_start(epoch, PROBE) for epoch in range(4)]

    bottom = made("bottom", 0)[0]
    assert bottom.layers == tuple(row.name for row in bottom.report.bottom(2))
    drawn = [[selection.layers for selection in made("random", seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_the_classifier_is_selected_only_if_included():
    assert CLAT(k=3).bind(build("backwards"), attack=PGD2).epoch_start(0, PROBE).layers != ("head.fc",)
    live = CLAT(k=4, classifier="include").bind(build("backwards"), attack=PGD2)
    assert set(live.epoch_start(0, PROBE).layers) == {"first", "second", "third", "head.fc"}


@pytest.mark.parametrize("base", ["clean_ce", "adv_ce", "inner"])
@pytest.mark.parametrize("name", ["normed", "resnet18", "tied", "attention", "called_twice"])
def test_steps_change_exactly_the_selected_layers(name, base):
    model = build(name)
    live = stack(PGDAT(), CLAT(k=1, start_epoch=1, base=base)).bind(model, attack=PGD2)
    optimizer = sgd(model)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    step(live, optimizer)
    selection = live.epoch_start(1, PROBE)  # without the optimizer: momentum of frozen layers stays
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        step(live, optimizer)
    changed = {key for key, value in model.state_dict().items() if not same(value, before[key])}
    chosen = model.get_submodule(selection.layers[0])
    expected = {
        key for key, value in model.state_dict(keep_vars=True).items() if any(value is p for p in chosen.parameters())
    }
    assert changed == expected


def test_gradients_outside_the_selection_are_none():
    model = build("backwards")
    live = CLAT(select="fixed", layers=("second",)).bind(model, attack=PGD2)
    live.epoch_start(0, PROBE)
    live(X, Y).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"second.weight", "second.bias"}
    assert names_of(model, live.trainable()) == {"second.weight", "second.bias"}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("staying", {"second.weight", "second.bias"}),
        ("keep", {"first.weight", "first.bias", "second.weight", "second.bias"}),
        ("reset", set()),
    ],
)
def test_momentum_at_a_new_selection(policy, kept):
    model = build("backwards")
    rule = InTurn(("first", "second"), ("second", "third"))
    live = CLAT(k=2, select=rule, every=1, on_reselect=policy).bind(model, attack=PGD2)
    optimizer = sgd(model)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    step(live, optimizer)
    assert names_of(model, optimizer.state) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    live.epoch_start(1, PROBE, optimizer=optimizer)
    assert names_of(model, optimizer.state) == kept
    step(live, optimizer)
    assert {"third.weight", "third.bias"} <= names_of(model, optimizer.state)


def test_the_first_selection_keeps_the_momentum_of_the_layers_that_go_on_training_and_of_no_other():
    model = build("backwards")
    live = stack(PGDAT(), CLAT(select="fixed", layers=("second",), start_epoch=1)).bind(model, attack=PGD2)
    optimizer = sgd(model)
    live.epoch_start(0, PROBE, optimizer=optimizer)
    step(live, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))
    live.epoch_start(1, PROBE, optimizer=optimizer)
    assert names_of(model, optimizer.state) == {"second.weight", "second.bias"}


def test_momentum_of_a_layer_that_comes_back_does_not_come_back():
    def second_step(policy):
        model = build("backwards")
        rule = InTurn(("first",), ("second",), ("first",))
        live = CLAT(k=1, select=rule, every=1, on_reselect=policy, lam=0.0).bind(model, attack=PGD2)
        optimizer = sgd(model)
        for epoch in range(3):
            live.epoch_start(epoch, PROBE, optimizer=optimizer)
            before = model.first.weight.detach().clone()
            step(live, optimizer)
        return model.first.weight.detach() - before, model.first.weight.grad + 0.05 * before

    change, gradient = second_step("staying")
    torch.testing.assert_close(change, -0.05 * gradient, rtol=1e-3, atol=1e-6)
    change, gradient = second_step("keep")
    assert not torch.allclose(change, -0.05 * gradient, rtol=1e-2)


def test_release_lets_everything_train_again():
    model = build("normed")
    live = CLAT(k=1).bind(model, attack=PGD2)
    live.epoch_start(0, PROBE)
    assert len(live.trainable()) < len(list(model.parameters()))
    live.release()
    assert live.trainable() == list(model.parameters())


def test_the_loop_is_told_rate_and_schedule():
    live = stack(PGDAT(), CLAT(k=1, start_epoch=4, lr="restart", lr_scale=0.1)).bind(build("backwards"), attack=PGD2)
    live.epoch_start(0, PROBE)
    assert (live.lr_scale, live.schedule_start, live.selected) == (1.0, 0, None)
    live.epoch_start(4, PROBE)
    assert (live.lr_scale, live.schedule_start) == (0.1, 4)
    assert live.selected is not None


def train(live, optimizer, epochs):
    found = []
    for epoch in epochs:
        selection = live.epoch_start(epoch, PROBE, optimizer=optimizer)
        found.append(None if selection is None else (selection.layers, selection.report))
        found += [step(live, optimizer, X[:4], Y[:4]), step(live, optimizer, X[4:], Y[4:])]
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"select": "random", "norm_stats": "follow", "norm_affine": "follow"}], ids=str
)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_continues_bit_for_bit(stop, settings, tmp_path):
    method = stack(PGDAT(), CLAT(k=1, start_epoch=2, every=2, **settings))
    model = build("normed")
    live, optimizer = method.bind(model, attack=PGD2), sgd(model)
    train(live, optimizer, range(stop))
    torch.save((model.state_dict(), optimizer.state_dict(), live.state_dict()), tmp_path / "state.pt")
    expected = train(live, optimizer, range(stop, 7))

    fresh = build("normed", seed=9)
    resumed, resumed_optimizer = method.bind(fresh, attack=PGD2), sgd(fresh)
    weights, moments, state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(weights)
    resumed_optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    assert train(resumed, resumed_optimizer, range(stop, 7)) == expected
    assert all(same(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_loading_a_state_without_a_selection_unfreezes_everything():
    model = build("normed")
    method = stack(PGDAT(), CLAT(k=1, start_epoch=1))
    live = method.bind(model, attack=PGD2)
    early = live.state_dict()
    live.epoch_start(1, PROBE)
    live.load_state_dict(early)
    assert live.selected is None
    assert live.trainable() == list(model.parameters())
