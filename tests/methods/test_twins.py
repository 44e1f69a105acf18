"""TWINS: the losses of its two nets by hand, what stays frozen, and its reductions to other methods."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from as_found import left_as_found, same
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.methods import CLAT, TWINS, stack
from toughen.objectives import METHODS, PGDAT
from toughen.types import AdversarialBatch, Batch, StepOutput, ThreatModel
from zoo import build, images

X, Y = images(8)
X64 = X.double()
FROZEN, ADAPTIVE = slice(1, None, 2), slice(0, None, 2)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)


def bound(model, inner=None, **settings):
    return stack(inner or PGDAT(), TWINS(**settings)).bind(model, attack=PGD2)


def parted(**settings):
    """A live method in float64 whose two nets differ, and a copy of the model as which the frozen net is to act."""
    model = build("normed").double()
    live = bound(model, **settings)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        model(X64)  # moves the running statistics
        for norm in (model.bn1, model.bn2):
            norm.weight.mul_(1.3).add_(0.1)
            norm.bias.sub_(0.2)
    frozen.bn1.eval()
    frozen.bn2.eval()
    for name in ("conv1", "conv2", "conv3", "head"):
        setattr(frozen, name, getattr(model, name))  # shared: both nets send their gradients to one place
    return live, model, frozen


def perturbed(live, x=X64, y=Y):
    return live.perturb(Batch(x, y), generator=torch.Generator().manual_seed(1))


def take_gradients(model, loss, *others):
    """The gradients of a model and of further parameters, which are cleared."""
    loss.backward()
    parameters = {**dict(model.named_parameters()), **dict(pair for named in others for pair in named.items())}
    found = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def norms_of(frozen):
    return {f"twins.{name}": p for name, p in frozen.named_parameters() if name.startswith("bn")}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def literal_twins_at(frozen, model, adv, lam):
    loss = lam * F.cross_entropy(frozen(adv.x_adv[FROZEN]), Y[FROZEN])
    return loss + F.cross_entropy(model(adv.x_adv[ADAPTIVE]), Y[ADAPTIVE])


def literal_twins_trades(frozen, model, adv, lam, beta):
    """As the paper's code has it: each KL divergence is a sum over its half, divided by the size of the whole batch."""
    total = 0.0
    for net, rows, weight in ((frozen, FROZEN, lam), (model, ADAPTIVE, 1.0)):
        clean, moved = net(X64[rows]), net(adv.x_adv[rows])
        divergence = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="sum") / len(X64)
        total = total + weight * (F.cross_entropy(clean, Y[rows]) + beta * divergence)
    return total


@pytest.mark.parametrize("form", ["at", "trades"])
def test_the_loss_and_its_gradient_are_those_of_the_paper(form):
    inner = PGDAT() if form == "at" else METHODS["trades"](beta=3.0)
    live, model, frozen = parted(inner=inner, lam=0.4)
    adv = perturbed(live)
    out = live.loss(adv)
    found = take_gradients(model, out.loss, live.own_parameters())
    if form == "at":
        expected = literal_twins_at(frozen, model, adv, 0.4)
    else:
        expected = literal_twins_trades(frozen, model, adv, 0.4, beta=6.0)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    assert_close(found, take_gradients(model, expected, norms_of(frozen)))
    assert all(found[name].any() for name in ("twins.bn1.weight", "bn1.weight", "conv1.weight"))


def test_the_log_tells_the_loss_of_both_nets():
    live, _, frozen = parted(lam=0.4)
    adv = perturbed(live)
    out = live.loss(adv)
    assert set(out.terms) == {"adv_ce", "frozen"}
    torch.testing.assert_close(out.terms["frozen"], F.cross_entropy(frozen(adv.x_adv[FROZEN]), Y[FROZEN]))
    torch.testing.assert_close(out.loss, out.terms["adv_ce"] + 0.4 * out.terms["frozen"])


def test_without_the_frozen_net_it_is_the_inner_method_on_the_other_half():
    model = build("normed").double()
    live = bound(model, lam=0.0)
    adv = perturbed(live)
    out = live.loss(adv)
    found = take_gradients(model, out.loss)
    expected = F.cross_entropy(model(adv.x_adv[ADAPTIVE]), Y[ADAPTIVE])
    torch.testing.assert_close(out.loss, expected)
    assert_close(found, take_gradients(model, expected))


def test_both_nets_are_one_while_statistics_and_affine_parameters_are_equal():
    model = build("normed").double().eval()  # eval: the adaptive net uses its running statistics too
    live = bound(model)
    adv = perturbed(live)
    halves = [F.cross_entropy(model(adv.x_adv[rows]), Y[rows]) for rows in (FROZEN, ADAPTIVE)]
    torch.testing.assert_close(live.loss(adv).loss, sum(halves))


def test_the_attack_searches_for_the_whole_batch_on_the_model_itself():
    live, model, _ = parted()
    alone = PGDAT().bind(model, attack=PGD2)
    assert torch.equal(perturbed(live).x_adv, perturbed(alone).x_adv)


def test_a_step_leaves_the_modes_of_the_model_and_its_second_batch_norm_as_found():
    live, model, _ = parted()
    model.bn1.eval()
    with left_as_found(model):
        live.perturb(Batch(X64, Y), generator=torch.Generator())
    counts = model.bn2.num_batches_tracked.clone()
    live.loss(perturbed(live))
    assert [norm.training for norm in (model.bn1, model.bn2)] == [False, True]
    assert model.bn2.num_batches_tracked == counts + 1  # the adaptive half alone


def steps(live, optimizer, count):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = live(X, Y).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def sgd(live):
    return torch.optim.SGD(live.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def statistics(state):
    return {name: value for name, value in state["frozen_net"].items() if "running" in name}


def test_training_moves_the_affine_parameters_of_both_nets_and_the_statistics_of_the_adaptive_one_alone():
    model = build("normed")
    live = bound(model)
    before, frozen = copy.deepcopy(model.state_dict()), live.state_dict()["frozen_net"]
    steps(live, sgd(live), 2)
    after = live.state_dict()["frozen_net"]
    assert set(frozen) == {
        f"{norm}.{kind}" for norm in ("bn1", "bn2") for kind in ("weight", "bias", "running_mean", "running_var")
    }
    assert [name for name in frozen if same(frozen[name], after[name])] == list(statistics(live.state_dict()))
    assert [name for name, value in model.state_dict().items() if same(value, before[name])] == []
    assert not same(after["bn1.weight"], model.bn1.weight.detach())


def test_until_it_starts_it_is_its_inner_method_and_then_the_statistics_are_those_of_that_time():
    model, reference = build("normed"), build("normed")
    live, alone = bound(model, start_epoch=1), PGDAT().bind(reference, attack=PGD2)
    live.epoch_start(0)
    expected = steps(alone, sgd(alone), 2)
    assert all(same(a, b) for a, b in zip(steps(live, sgd(live), 2), expected, strict=True))
    live.epoch_start(1)
    frozen = live.state_dict()["frozen_net"]
    assert all(same(value, model.state_dict()[name]) for name, value in frozen.items())
    assert set(live(X, Y).terms) == {"adv_ce", "frozen"}
    live.epoch_start(2)
    assert all(same(value, frozen[name]) for name, value in live.state_dict()["frozen_net"].items() if "mean" in name)


def test_of_an_odd_batch_the_frozen_net_gets_the_smaller_half():
    live, model, frozen = parted()
    adv = perturbed(live, X64[:5], Y[:5])
    expected = F.cross_entropy(frozen(adv.x_adv[1::2]), Y[1:5:2]) + F.cross_entropy(model(adv.x_adv[::2]), Y[:5:2])
    torch.testing.assert_close(live.loss(adv).loss, expected)


def test_both_nets_get_their_share_of_the_images_at_the_end_of_a_batch():
    live, _, _ = parted()
    seen = []
    live.inner.loss = lambda adv: seen.append(adv.batch.y.tolist()) or StepOutput(adv.x_adv.sum())
    mixed = Batch(X64, torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]))  # the extra images come last
    live.loss(AdversarialBatch(mixed, X64))
    assert seen == [[1, 3, -1, -1], [0, 2, -1, -1]]


def test_of_a_single_image_the_frozen_net_gets_nothing():
    live, model, _ = parted()
    adv = perturbed(live, X64[:1], Y[:1])
    torch.testing.assert_close(live.loss(adv).loss, F.cross_entropy(model(adv.x_adv), Y[:1]))


@pytest.mark.parametrize("base", ["clean_ce", "inner"])
def test_behind_clat_it_halves_the_loss_of_clat(base):
    model = build("normed")
    clat = CLAT(select="fixed", layers=("conv2",), lam=0.5, base=base)
    live = stack(PGDAT(), clat, TWINS(lam=0.0)).bind(model, attack=PGD2)
    live.epoch_start(0, [(X, Y)])
    adv = perturbed(live, X).elsewhere()
    half = Batch(X[ADAPTIVE], Y[ADAPTIVE])
    inner = None if adv.inner is None else adv.inner._replace(batch=half, x_adv=adv.inner.x_adv[ADAPTIVE])
    expected = live.inner.loss(adv._replace(batch=half, x_adv=adv.x_adv[ADAPTIVE], inner=inner)).loss
    assert (inner is None) == (base == "clean_ce")
    torch.testing.assert_close(live.loss(adv).loss, expected)


def test_in_front_of_clat_it_is_the_inner_loss_of_the_selected_layers():
    model = build("normed")
    live = stack(PGDAT(), TWINS(), CLAT(select="fixed", layers=("conv2",), lam=0.0, base="inner")).bind(
        model, attack=PGD2
    )
    before = copy.deepcopy(model.state_dict())
    live.epoch_start(0, [(X, Y)])
    steps(live, sgd(live), 2)
    moved = {name for name, value in model.state_dict().items() if not same(value, before[name])}
    assert moved == {"conv2.weight", "conv2.bias"}


def test_a_resumed_run_continues_bit_identically():
    model = build("normed")
    live = bound(model)
    optimizer = sgd(live)
    live.epoch_start(0)
    steps(live, optimizer, 2)
    file = io.BytesIO()
    torch.save((model.state_dict(), live.state_dict(), optimizer.state_dict()), file)
    expected = steps(live, optimizer, 2)

    file.seek(0)
    weights, state, momentum = torch.load(file, weights_only=True)
    fresh = build("normed", seed=1)
    fresh.load_state_dict(weights)
    again = bound(fresh)
    optimizer = sgd(again)
    optimizer.load_state_dict(momentum)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(steps(again, optimizer, 2), expected, strict=True))
    assert all(same(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_adaptive_net_is_deployed():
    model = build("normed")
    assert bound(model).deployed() is model


def test_the_label_is_that_of_the_papers_row():
    assert stack(PGDAT(), TWINS()).label == "PGD-AT + TWINS"
    assert METHODS["twins"] is TWINS


def test_a_network_without_batch_norm_is_refused_before_training():
    live = bound(build("backwards"))
    message = (
        "twins gives each half of a batch its own batch norm, and Backwards has none with running statistics;"
        " use a network with batch norm, for example resnet18"
    )
    with pytest.raises(InputError, match=message):
        live.check(X[:1])
    bound(build("normed")).check(X[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -0.5}, "twins lam is -0.5; it must be a finite number >= 0"),
        ({"lam": float("inf")}, "twins lam is inf; it must be a finite number >= 0"),
        ({"start_epoch": -1}, "twins start_epoch is -1; it must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TWINS(**settings)


def test_it_needs_an_inner_method():
    with pytest.raises(InputError, match="TWINS stands alone but it only changes the training of another method"):
        stack(TWINS())
    with pytest.raises(InputError, match=r"use stack\(PGDAT\(\), TWINS\(...\)\)"):
        TWINS().bind(build("normed"), attack=PGD2)


def test_stacks_that_would_silence_it_or_move_its_statistics_are_refused():
    with pytest.raises(InputError, match="TWINS inside CLAT would never act"):
        stack(PGDAT(), TWINS(), CLAT(k=1))
    with pytest.raises(InputError, match="CLAT inside TWINS with norm_stats='follow' would move batch statistics"):
        stack(PGDAT(), CLAT(k=1, norm_stats="follow"), TWINS())
