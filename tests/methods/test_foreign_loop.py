"""The public Python interface, used in a plain PyTorch loop that is not ours."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg

EPOCHS = 12


@pytest.fixture
def loader():
    """Images whose class is their bright quadrant: something that a network can learn."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(4, (64,), generator=draw)
    x = 0.4 * torch.rand(64, 3, 8, 8, generator=draw)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 0.5
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=draw)


@pytest.fixture
def pgd():
    return tg.PGD(tg.ThreatModel(norm="linf", eps=8 / 255), step_size=2 / 255, steps=2)


def test_an_analysis_reads_like_the_contract(loader, pgd):
    model = tg.models.create("resnet18", num_classes=4, width=4, seed=0)
    report = tg.analyze(model, loader, attack=pgd)
    assert [row.index for row in report.rows] == list(range(21))
    assert report.rows[20].name == "linear"
    assert all(row.weakness > 0 and row.criticality > 0 for row in report.rows)
    assert len(report.top(5)) == 5
    assert report.top(5)[0].criticality == max(row.criticality for row in report.rows[:20])
    assert "layer4.1.conv2" in str(report)


def test_clat_in_anyones_loop_lowers_the_loss_and_moves_only_what_it_selected(loader, pgd):
    model = tg.models.create("small_cnn", num_classes=4, width=4, seed=0)
    clat = tg.CLAT(k=3).bind(model, attack=pgd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    probe = [next(iter(loader))]
    losses, selections = [], {}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for epoch in range(EPOCHS):
        model.train()
        if selection := clat.epoch_start(epoch, probe, optimizer=optimizer):
            selections[epoch] = selection.layers
        for x, y in loader:
            optimizer.zero_grad()
            loss = clat(x, y).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert list(selections) == [0, 10]
    ever = {f"{layer}.weight" for layers in selections.values() for layer in layers}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == ever
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_stack_trains_first_with_its_objective_and_then_with_clat(loader, pgd):
    model = tg.models.create("small_cnn", num_classes=4, width=4, seed=0)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=2))
    assert method.label == "PGD-AT + CLAT"
    live = method.bind(model, attack=pgd)
    optimizer = torch.optim.SGD(live.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    terms = []
    for epoch in range(3):
        model.train()
        live.epoch_start(epoch, loader, optimizer=optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            out = live(x, y)
            out.loss.backward()
            optimizer.step()
        terms.append(set(out.terms))
    assert terms == [{"adv_ce"}, {"adv_ce"}, {"clean_ce", "feature"}]


def test_pgd_at_binds_like_a_method_and_trains(loader, pgd):
    model = tg.models.create("small_cnn", num_classes=4, width=4, seed=0)
    live = tg.PGDAT().bind(model, attack=pgd)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            loss = live(x, y).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_fixed_layers_of_resnet18_can_be_named(loader, pgd):
    model = tg.models.create("resnet18", num_classes=4, width=4, seed=0)
    rule = tg.criticality.selection.Fixed(("layer3.0.conv2",))
    clat = tg.CLAT(k=1, select=rule).bind(model, attack=pgd)
    assert clat.epoch_start(0, loader).layers == ("layer3.0.conv2",)
    x, y = next(iter(loader))
    clat(x, y).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"layer3.0.conv2.weight"}


def test_the_defaults_build_the_papers_network():
    model = tg.models.create("resnet18")
    layers = tg.map_layers(model, torch.rand(1, 3, 8, 8))
    assert len(layers) == 21
    assert layers[11].name == "layer3.0.conv2"
