"""AWP against its formula by hand and against a loop written like the official one, alone and with other methods."""

import io
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from as_found import left_as_found, same
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.methods import AWP, CLAT, stack
from toughen.objectives import PGDAT, CleanCE
from toughen.objectives.live import Live
from toughen.types import AdversarialBatch, Batch, StepOutput, ThreatModel
from zoo import EVERY, RESTLESS, build, images

X, Y = images(8)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)


class OnTheSpot(Live):
    """A cross-entropy that attacks nothing and notes with what it is called."""

    def __init__(self, model, *, scale=None):
        super().__init__(model)
        self.scale = scale
        self.seen = []

    def perturb(self, batch, *, generator):
        return AdversarialBatch(batch, batch.x)

    def loss(self, adv):
        self.seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        loss = F.cross_entropy(self.view(adv.x_adv), adv.batch.y)
        loss = loss if self.scale is None else loss * self.scale
        return StepOutput(loss, {"ce": loss.detach()})

    def own_parameters(self):
        return {} if self.scale is None else {"scale": self.scale}


def on_the_spot(model, x=X, **settings):
    """AWP around the cross-entropy, and the batch that it is called with."""
    inner = OnTheSpot(model, scale=settings.pop("scale", None))
    return AWP(**settings).bind(model, attack=PGD2, inner=inner), AdversarialBatch(Batch(x, Y), x)


def moved_by_hand(model, x, gamma, seed=None):
    """A copy of the model at w + gamma * v, for the cross-entropy."""
    twin = deepcopy(model)
    if seed is not None:
        torch.manual_seed(seed)
    F.cross_entropy(twin(x), Y).backward()
    moved = deepcopy(model)
    for there, here in zip(moved.parameters(), twin.parameters(), strict=True):
        if here.dim() > 1 and here.grad is not None:
            there.data += gamma * here.data.norm() / here.grad.norm() * here.grad
    return moved


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_close(model, reference):
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["normed", "tied", "unused", "attention", "functional"])
def test_loss_and_gradient_are_those_at_the_moved_weights(name):
    model, x = build(name).double(), X.double()
    reference = moved_by_hand(model, x, 0.05)
    live, adv = on_the_spot(model, x, gamma=0.05)
    out = live.loss(adv)
    out.loss.backward()
    loss = F.cross_entropy(reference(x), Y)
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=0)
    assert same(out.terms["ce"], out.loss.detach())
    assert_gradients_close(model, reference)


def official_steps(model, batches, *, gamma, lr, momentum, decay):
    """Train as the official code does: a proxy, a difference of weights, a step taken at the moved weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    for x_adv in batches:
        proxy = deepcopy(model)
        descent = torch.optim.SGD(proxy.parameters(), lr=0.01)
        (-F.cross_entropy(proxy(x_adv), Y)).backward()
        descent.step()
        difference = {}
        before, after = model.state_dict(), proxy.state_dict()
        for name, weight in before.items():
            if weight.dim() > 1 and "weight" in name:
                step = after[name] - weight
                difference[name] = weight.norm() / (step.norm() + 1e-20) * step
        named = dict(model.named_parameters())
        for name, step in difference.items():
            named[name].data += gamma * step
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), Y).backward()
        optimizer.step()
        for name, step in difference.items():
            named[name].data -= gamma * step


def test_with_the_decay_of_the_optimizer_it_takes_the_steps_of_the_official_code():
    model, reference, x = build("normed").double(), build("normed").double(), X.double()
    rates = {"lr": 0.1, "momentum": 0.9}
    official_steps(reference, [x, x.flip(0), x], gamma=0.05, decay=0.3, **rates)

    optimizer = torch.optim.SGD(model.parameters(), weight_decay=0.3, **rates)
    for images_ in (x, x.flip(0), x):
        live, adv = on_the_spot(model, images_, gamma=0.05, decay=0.3)
        optimizer.zero_grad()
        live.loss(adv).loss.backward()
        optimizer.step()

    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_decay_changes_the_gradient_and_not_the_loss():
    model, plain = build("normed"), build("normed")
    outs = []
    for network, decay in ((model, 0.3), (plain, 0.0)):
        live, adv = on_the_spot(network, decay=decay)
        outs.append(live.loss(adv).loss)
        outs[-1].backward()
    assert same(outs[0], outs[1])
    assert not same(model.conv1.weight.grad, plain.conv1.weight.grad)
    assert same(model.conv2.bias.grad, plain.conv2.bias.grad)


def test_each_weight_moves_by_gamma_times_its_length_and_biases_and_norms_stay():
    model = build("normed")
    live, adv = on_the_spot(model, gamma=0.02)
    live.loss(adv)
    here, there = live.inner.seen
    for name, weight in here.items():
        if weight.dim() > 1:
            torch.testing.assert_close((there[name] - weight).norm(), 0.02 * weight.norm(), rtol=1e-4, atol=0)
        else:
            assert same(there[name], weight)


def test_the_loss_rises_along_the_direction():
    live, adv = on_the_spot(build("normed"), gamma=1e-3)
    assert live.loss(adv).loss > live.inner.loss(adv).loss


@pytest.mark.parametrize("name", EVERY)
def test_the_weights_are_left_bit_for_bit_as_found(name):
    model = build(name).eval()
    live, adv = on_the_spot(model)
    if name in RESTLESS:  # they draw, or count, in any forward
        before = [p.clone() for p in model.parameters()]
        live.loss(adv)
        assert all(map(same, before, model.parameters()))
        return
    with left_as_found(model):
        live.loss(adv)


def test_statistics_move_once_per_step_with_the_moved_weights():
    model = build("normed").double()
    reference = moved_by_hand(model, X.double(), 0.01)
    live, adv = on_the_spot(model, X.double())
    live.loss(adv)
    reference(X.double())
    for (name, value), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14, msg=name)


def test_both_passes_meet_the_same_dropout_and_draw_once():
    model = build("dropouts")
    reference = moved_by_hand(model, X, 0.1, seed=5)
    live, adv = on_the_spot(model, gamma=0.1)
    torch.manual_seed(5)
    loss = live.loss(adv).loss
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.testing.assert_close(loss, F.cross_entropy(reference(X), Y))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"start_epoch": 2}], ids=str)
def test_switched_off_it_is_the_inner_method_to_the_bit_in_one_pass(settings):
    model, plain = build("normed"), build("normed")
    live, adv = on_the_spot(model, **settings)
    live.epoch_start(1)
    inner = OnTheSpot(plain)
    out, wanted = live.loss(adv), inner.loss(adv)
    out.loss.backward()
    wanted.loss.backward()
    assert len(live.inner.seen) == 1
    assert same(out.loss, wanted.loss)
    assert all(map(same, gradients(model).values(), gradients(plain).values()))
    assert all(map(same, model.buffers(), plain.buffers()))


def test_it_begins_with_start_epoch_and_a_resumed_run_knows_the_epoch():
    live, adv = on_the_spot(build("normed"), start_epoch=2)
    live.epoch_start(2)
    assert same(*_resumed_losses(live, adv))
    live.inner.seen.clear()
    live.loss(adv)
    assert len(live.inner.seen) == 2


def _resumed_losses(live, adv):
    file = io.BytesIO()
    torch.save({"live": live.state_dict(), "model": live.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _ = on_the_spot(build("normed", seed=1), start_epoch=2)
    other.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["live"])
    assert len(other.inner.seen) == 0
    losses = live.loss(adv).loss, other.loss(adv).loss
    assert len(other.inner.seen) == 2
    return losses


def test_parameters_of_the_inner_method_get_their_gradient_at_the_moved_weights():
    model, scale = build("normed").double(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    live, adv = on_the_spot(model, X.double(), scale=scale, gamma=0.05)
    live.loss(adv).loss.backward()
    reference = moved_by_hand(model, X.double(), 0.05)
    torch.testing.assert_close(scale.grad, F.cross_entropy(reference(X.double()), Y).detach())


class Doubled(nn.Module):
    """A weight that is computed from another."""

    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_weight_moves_through_what_it_is_computed_from():
    model, x = build("normed").double(), X.double()
    parametrize.register_parametrization(model.conv2, "weight", Doubled())
    reference = moved_by_hand(model, x, 0.05)
    live, adv = on_the_spot(model, x, gamma=0.05)
    out = live.loss(adv)
    out.loss.backward()
    F.cross_entropy(reference(x), Y).backward()
    assert_gradients_close(model, reference)
    assert model.conv2.parametrizations.weight.original.grad is not None


def test_an_image_that_asks_for_a_gradient_gets_that_of_the_loss():
    model, x = build("normed").double(), X.double().requires_grad_(True)
    live, adv = on_the_spot(model, x, gamma=0.05)
    live.loss(adv).loss.backward()
    at = X.double().requires_grad_(True)
    F.cross_entropy(moved_by_hand(model, X.double(), 0.05)(at), Y).backward()
    torch.testing.assert_close(x.grad, at.grad, rtol=1e-9, atol=1e-14)


class NoRead(TorchDispatchMode):
    """Refuses to hand a value to Python, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    live, adv = on_the_spot(build("normed"), decay=0.1)
    with NoRead():
        live.loss(adv).loss.backward()
    with pytest.raises(AssertionError), NoRead():
        float(adv.x_adv.sum())


def test_it_trains_under_autocast():
    model = build("resnet18")
    live = stack(PGDAT(), AWP(gamma=0.05)).bind(model, attack=PGD2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = live(X, Y).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_frozen_layers_do_not_move_under_clat():
    model = build("backwards")
    clat = CLAT(select="fixed", layers=("second",), lam=0.7)
    live = stack(PGDAT(), clat, AWP(gamma=0.05)).bind(model, attack=PGD2)
    live.epoch_start(0, [(X, Y)])
    adv = live.perturb(Batch(X, Y), generator=torch.Generator().manual_seed(0)).elsewhere()
    (gradient,) = torch.autograd.grad(live.inner.loss(adv).loss, [model.second.weight])
    moved = deepcopy(model)
    moved.second.weight.data += 0.05 * moved.second.weight.data.norm() / gradient.norm() * gradient
    fixed = stack(PGDAT(), clat).bind(moved, attack=PGD2)
    fixed.epoch_start(0, [(X, Y)])
    torch.testing.assert_close(live.loss(adv).loss, fixed.loss(adv).loss)


@pytest.mark.parametrize(
    "methods",
    [
        (PGDAT(), AWP(gamma=0.05)),
        (PGDAT(), AWP(gamma=0.05), CLAT(k=1, base="inner", lam=0)),
        (PGDAT(), AWP(gamma=0.05), CLAT(k=1, start_epoch=1)),
        (PGDAT(), CLAT(k=1), AWP(gamma=0.05)),
        (CleanCE(), AWP(gamma=0.05)),
    ],
    ids=lambda methods: stack(*methods).label,
)
def test_two_steps_change_exactly_what_trains(methods):
    model = build("normed")
    live = stack(*methods).bind(model, attack=PGD2)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    for epoch in range(2):
        live.epoch_start(epoch, [(X, Y)], optimizer=optimizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        live(X, Y).loss.backward()
        optimizer.step()
        live.step_end()
        changed = {name for name, p in model.named_parameters() if not same(p, before[name])}
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        # a bias in front of a batch norm has no effect; the float that remains of its gradient may be 0
        assert training - {"conv2.bias"} <= changed <= training


def test_its_label_stands_in_the_row_label():
    assert stack(PGDAT(), CLAT(k=1), AWP()).label == "PGD-AT + CLAT + AWP"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -0.5}, r"awp gamma is -0\.5; it must be a finite number >= 0"),
        ({"gamma": float("nan")}, "awp gamma is nan"),
        ({"decay": float("inf")}, "awp decay is inf"),
        ({"start_epoch": -1}, "awp start_epoch is -1; it must be >= 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AWP(**settings)


def test_it_can_not_stand_alone_nor_silently_inside_a_clat_that_has_a_loss_of_its_own():
    with pytest.raises(InputError, match="AWP stands alone but it only changes the training of another method"):
        stack(AWP())
    with pytest.raises(InputError, match="use stack"):
        AWP().bind(build("normed"), attack=PGD2)
    with pytest.raises(InputError, match="AWP inside CLAT would never act"):
        stack(PGDAT(), AWP(), CLAT(k=1))
