"""Free-AT: replays, and a perturbation that goes on from batch to batch."""

import pytest
import torch
import torch.nn.functional as F

from as_found import same
from objective_checks import X, Y
from toughen import AWP, CLAT, FreeAT, processes, stack
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.methods import Stack
from toughen.objectives import METHODS
from toughen.types import Batch, ThreatModel
from zoo import build, images

EPS = 0.1
ATTACK = PGD(ThreatModel(eps=EPS), step_size=0.01, steps=40)  # its steps are not used
BATCHES = [images(size, seed=seed) for seed, size in enumerate((6, 6, 4, 6))]  # one is smaller


def start(method, model):
    live = method.bind(model, attack=ATTACK)
    return live, torch.optim.SGD(live.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(live, optimizer, batches):
    losses = []
    for x, y in batches:
        for _ in range(live.replays):
            output = live(x.to(next(live.model.parameters()).dtype), y)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            live.step_end()
            losses.append(output.loss.detach())
    return losses


def reference(model, replays, batches):
    """The published loop, written out: weights at the old delta, then delta by the gradient of the same backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    noise, updates = torch.zeros_like(batches[0][0]).double(), 0
    for x, y in batches:
        for _ in range(replays):
            perturbed = (x.double() + noise[: len(x)]).clamp(0, 1).requires_grad_(True)
            optimizer.zero_grad()
            F.cross_entropy(model(perturbed), y).backward()
            noise[: len(x)] = (noise[: len(x)] + EPS * perturbed.grad.sign()).clamp(-EPS, EPS)
            optimizer.step()
            updates += 1
    return updates


@pytest.mark.parametrize("replays", [1, 3])
def test_training_is_that_of_the_published_loop(replays):
    ours, theirs = build("nested").double(), build("nested").double()
    losses = train(*start(FreeAT(replays=replays), ours), BATCHES)
    assert len(losses) == reference(theirs, replays, BATCHES) == replays * len(BATCHES)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10, msg=name)


def test_the_perturbation_survives_the_border_of_a_batch_and_stays_in_the_ball():
    live, optimizer = start(FreeAT(replays=2), build("nested"))
    for x, y in BATCHES:
        train(live, optimizer, [(x, y)])
        delta = live.state_dict()["delta"]
        assert float(delta.abs().max()) == pytest.approx(EPS)
        begun = live.perturb(Batch(x, y), generator=torch.Generator()).x_adv
        assert same(begun.detach(), (x + delta[: len(x)]).clamp(0, 1))


def test_the_first_replay_of_the_first_batch_is_clean():
    live, _ = start(FreeAT(), build("nested"))
    expected = F.cross_entropy(build("nested")(X), Y)
    torch.testing.assert_close(live(X, Y).loss, expected)


def test_a_step_that_never_came_moves_nothing():
    live, _ = start(FreeAT(), build("nested"))
    live(X, Y)
    live.step_end()
    assert not live.state_dict()["delta"].any()


def test_the_gradient_reaches_the_perturbation_through_awp():
    live, optimizer = start(stack(FreeAT(replays=2), AWP()), build("nested"))
    train(live, optimizer, BATCHES)
    assert live.inner.state_dict()["delta"].any()


@pytest.mark.parametrize(
    ("clat", "replays"), [(CLAT(k=1), 1), (CLAT(k=1, base="inner", lam=0.0), 3), (CLAT(k=1, base="inner", lam=0.1), 3)]
)
def test_under_clat_batches_are_replayed_where_its_loss_is_kept(clat, replays):
    live, optimizer = start(stack(FreeAT(replays=3), clat), build("backwards"))
    assert live.replays == 3
    live.epoch_start(0, [(X, Y)], optimizer=optimizer)
    assert live.replays == replays
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    assert all(loss.isfinite() for loss in train(live, optimizer, BATCHES))
    moved = {name.rpartition(".")[0] for name, p in live.model.named_parameters() if not same(p, before[name])}
    assert moved == set(live.selected)


def test_its_state_continues_bit_for_bit():
    live, optimizer = start(FreeAT(replays=2), build("nested"))
    train(live, optimizer, BATCHES[:2])
    saved = [live.model.state_dict(), live.state_dict(), optimizer.state_dict()]
    again, fresh = start(FreeAT(replays=2), build("nested", seed=5))
    weights, state, momentum = torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value, saved
    )
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    fresh.load_state_dict(momentum)
    expected = train(live, optimizer, BATCHES[2:])
    assert all(map(same, train(again, fresh, BATCHES[2:]), expected))


def test_a_state_stays_as_it_was_taken_and_as_it_was_loaded():
    live, optimizer = start(FreeAT(replays=2), build("nested"))
    train(live, optimizer, BATCHES[:1])
    state = live.state_dict()
    before = state["delta"].clone()
    train(live, optimizer, BATCHES[1:])
    again, fresh = start(FreeAT(replays=2), build("nested"))
    again.load_state_dict(state)
    train(again, fresh, BATCHES[1:])
    assert not same(live.state_dict()["delta"], before)
    assert same(state["delta"], before)


def test_a_process_with_fewer_images_than_another_hands_in_as_many_rows(monkeypatch):
    live, optimizer = start(FreeAT(replays=2), build("nested"))
    train(live, optimizer, BATCHES[2:3])
    own = live.state_dict()["delta"]
    monkeypatch.setattr(processes, "most", lambda mine: mine + 2)
    padded = live.state_dict()["delta"]
    assert (len(own), len(padded)) == (4, 6)
    assert torch.equal(padded[:4], own)
    assert not padded[4:].any()


def test_it_does_not_go_with_what_carries_perturbations_over():
    assert "leave carry-over out" in FreeAT.conflicts["carry-over"]
    assert isinstance(stack(FreeAT()), Stack)


def test_it_is_registered_under_the_name_of_its_row():
    assert METHODS["free-at"] is FreeAT
    assert FreeAT.label == "Free-AT"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replays": 0}, r"free-at replays is 0; a batch must be used at least once"),
        ({"step": -0.5}, r"free-at step is -0\.5; it must be a finite multiple of eps >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FreeAT(**settings)
