"""AutoLoRA: the loss of its two branches by hand, what each of them trains, and how it weighs them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from as_found import left_as_found, same
from toughen.attacks import PGD
from toughen.attacks.threat import gaussian_start
from toughen.errors import InputError
from toughen.methods import CLAT, stack
from toughen.objectives import METHODS, PGDAT, AutoLoRA
from toughen.types import Batch, ThreatModel
from zoo import Head, build, images

X, Y = images(8)
X64 = X.double()
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
CONVOLUTIONS = ("conv1", "conv2", "conv3")
CLASSIFIER = ("head.fc.weight", "head.fc.bias")


def bound(model, probe=((X, Y),), **settings):
    live = AutoLoRA(**settings).bind(model, attack=PGD2)
    live.epoch_start(0, [(x.to(next(model.parameters()).dtype), y) for x, y in probe])
    return live


def adapted(**settings):
    """A live method in float64 whose adapters do something."""
    model = build("normed").double()
    live = AutoLoRA(**settings).bind(model, attack=PGD2)
    draw = torch.Generator().manual_seed(16)  # with which the two branches answer differently
    with torch.no_grad():
        for name, factor in live.own_parameters().items():
            if name.endswith(".b"):
                factor.copy_(torch.randn(factor.shape, generator=draw))
        model.head.fc.bias.zero_()
    return live, model


def perturbed(live, x=X64, y=Y):
    return live.perturb(Batch(x, y), generator=torch.Generator().manual_seed(1))


def change(live, name, weight, scale=1 / 8):
    own = live.own_parameters()
    return scale * (own[f"{name}.weight.b"] @ own[f"{name}.weight.a"]).reshape(weight.shape)


def natural_net(live, model, logits_of):
    """The natural branch as a network of its own: its convolutions are the model's plus the adapters, as constants."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        for name in CONVOLUTIONS:
            weight = net.get_parameter(f"{name}.weight")
            weight.add_(change(live, name, weight))
    return net, logits_of(net)


def test_the_loss_and_its_gradient_are_those_of_the_paper():
    live, model = adapted()
    live.epoch_start(0, [(X64, Y)])
    live.l1, live.l2 = 0.3, 4.2
    adv = perturbed(live)
    reference = copy.deepcopy(model)
    out = live.loss(adv)
    out.loss.backward()

    net, natural = natural_net(live, reference, lambda net: net(X64))
    adversarial = reference(adv.x_adv)
    expected = 0.3 * F.cross_entropy(natural, Y) + 0.7 * F.cross_entropy(adversarial, Y)
    expected = expected + 4.2 * F.kl_div(adversarial.log_softmax(1), natural.softmax(1), reduction="sum") / 8
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)

    expected.backward()
    for name, parameter in model.named_parameters():
        gradient = reference.get_parameter(name).grad
        if name in CLASSIFIER:
            gradient = gradient + net.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    own = live.own_parameters()
    for name in CONVOLUTIONS:
        a, b = own[f"{name}.weight.a"], own[f"{name}.weight.b"]
        by_change = net.get_parameter(f"{name}.weight").grad.reshape(len(b), -1) / 8  # d loss / d (b a)
        torch.testing.assert_close(a.grad, b.T @ by_change, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.grad, by_change @ a.T, rtol=1e-9, atol=1e-12)


def test_the_log_tells_the_parts_of_the_loss():
    live, model = adapted()
    model.eval()
    live.epoch_start(0, [(X64, Y)])
    out = live.loss(perturbed(live))
    parts = out.terms["natural_ce"], out.terms["adv_ce"], out.terms["kl"]
    assert set(out.terms) == {"natural_ce", "adv_ce", "kl"}
    torch.testing.assert_close(out.loss, live.l1 * parts[0] + (1 - live.l1) * parts[1] + live.l2 * parts[2])


def test_both_branches_begin_alike():
    model = build("normed")
    live = bound(model)
    assert same(live.natural(X), model(X))
    assert all(factor.any() != name.endswith(".b") for name, factor in live.own_parameters().items())


def test_the_natural_branch_trains_the_adapters_and_the_classifier_alone():
    live, model = adapted()
    live.epoch_start(0, [(X64, Y)])
    F.cross_entropy(live.natural(X64), Y).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(CLASSIFIER)
    assert all(factor.grad.any() for factor in live.own_parameters().values())


def test_the_attack_raises_the_cross_entropy_of_the_network_without_adapters():
    live, model = adapted()
    start = gaussian_start(X64, torch.Generator().manual_seed(1))
    assert torch.equal(perturbed(live).x_adv, PGD2(model, X64, Y, start=start))
    given = (X64 + 0.05).clamp(0, 1)
    adv = live.perturb(Batch(X64, Y, start=given), generator=torch.Generator())
    assert torch.equal(adv.x_adv, PGD2(model, X64, Y, start=given))


def test_perturbing_and_measuring_leave_the_model_as_found():
    live, model = adapted()
    model.bn1.eval()
    with left_as_found(model):
        live.epoch_start(0, [(X64, Y)])
        perturbed(live)


# -- the weights of the terms ---------------------------------------------------------------------


def answers(live, model):
    """What the natural branch says of X in eval mode."""
    return natural_net(live, model, lambda net: net.eval()(X64).argmax(1))[1]


def test_the_weights_follow_from_the_clean_accuracy_of_the_natural_branch():
    live, model = adapted(kl_scale=4.0)
    right = answers(live, model)
    assert not torch.equal(right, model.eval()(X64).argmax(1))
    wrong = (right + 1) % 4
    for count in (0, 3, 8):
        labels = torch.where(torch.arange(8) < count, right, wrong)
        live.epoch_start(count, [(X64[:3], labels[:3]), (X64[3:], labels[3:])])
        assert live.facts() == {"l1": 1 - count / 8, "l2": 4.0 * count / 8}


def test_only_labelled_images_of_the_first_probe_size_are_counted():
    live, model = adapted(probe_size=4)
    right = answers(live, model)
    labels = torch.stack([right[0], right[1], (right[2] + 1) % 4, torch.tensor(-1), *((right[4:] + 1) % 4)])
    live.epoch_start(0, [(X64, labels)])
    assert live.facts() == pytest.approx({"l1": 1 / 3, "l2": 6 * 2 / 3})
    assert live.probe_size == 4


def test_an_accuracy_of_zero_leaves_the_natural_cross_entropy_and_of_one_the_adversarial_branch_and_the_divergence():
    live, model = adapted()
    model.eval()
    right = answers(live, model)
    adv = perturbed(live)
    live.epoch_start(0, [(X64, (right + 1) % 4)])
    torch.testing.assert_close(live.loss(adv).loss, F.cross_entropy(live.natural(X64), Y))
    live.epoch_start(1, [(X64, right)])
    clean, moved = live.natural(X64).softmax(1), model(adv.x_adv)
    divergence = F.kl_div(moved.log_softmax(1), clean, reduction="batchmean")
    torch.testing.assert_close(live.loss(adv).loss, F.cross_entropy(moved, Y) + 6 * divergence)


def test_images_without_a_label_add_nothing():
    live, model = adapted()
    model.eval()
    live.epoch_start(0, [(X64, Y)])
    labels = torch.where(torch.arange(8) < 5, Y, -1)
    adv = perturbed(live, X64, labels)
    alone = adv._replace(batch=Batch(X64[:5], Y[:5]), x_adv=adv.x_adv[:5])
    torch.testing.assert_close(live.loss(adv).loss, live.loss(alone).loss)


# -- the adapters ---------------------------------------------------------------------------------


def test_the_adapters_have_the_rank_and_the_size_of_the_official_code():
    live, model = adapted(rank=1, alpha=2.0)
    shapes = {name: tuple(factor.shape) for name, factor in live.own_parameters().items()}
    assert shapes == {
        "conv1.weight.a": (3, 9),
        "conv1.weight.b": (12, 3),
        "conv2.weight.a": (3, 12),
        "conv2.weight.b": (12, 3),
        "conv3.weight.a": (3, 12),
        "conv3.weight.b": (15, 3),
    }
    live.epoch_start(0, [(X64, Y)])
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name in CONVOLUTIONS:
            weight = expected.get_parameter(f"{name}.weight")
            added = change(live, name, weight, scale=2.0)
            assert torch.linalg.matrix_rank(added.reshape(shapes[f"{name}.weight.b"][0], -1)) == 3
            weight.add_(added)
    torch.testing.assert_close(live.natural(X64), expected(X64))


class Odd(nn.Module):
    """Convolutions in groups, transposed, and not square; the classifier is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.back = nn.ConvTranspose2d(6, 4, (2, 3), groups=2)
        self.last = nn.Conv2d(4, 4, (1, 3))
        self.classifier = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.classifier(F.relu(self.last(self.back(F.relu(self.grouped(x)))))).mean(dim=(2, 3))


def test_every_kind_of_convolution_gets_an_adapter_that_trains_but_the_classifier_does_not():
    model = Odd()
    live = bound(model)
    with torch.no_grad():
        for name, factor in live.own_parameters().items():
            factor.fill_(0.1 if name.endswith(".b") else 0.2)
    live.natural(X).sum().backward()
    trained = {name for name, factor in live.own_parameters().items() if factor.grad is not None}
    assert trained == {f"{name}.weight.{side}" for name in ("grouped", "back", "last") for side in "ab"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_seed_decides_the_adapters():
    first, again, other = (AutoLoRA().bind(build("normed"), attack=PGD2, seed=seed) for seed in (0, 0, 1))
    a = "conv1.weight.a"
    assert same(first.own_parameters()[a], again.own_parameters()[a])
    assert not same(first.own_parameters()[a], other.own_parameters()[a])


# -- in a loop ------------------------------------------------------------------------------------


def sgd(live):
    return torch.optim.SGD(live.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def steps(live, optimizer, count):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = live(X, Y).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_two_steps_train_everything_and_the_plain_network_is_deployed():
    model = build("normed")
    live = bound(model)
    before = copy.deepcopy({**model.state_dict(), **live.own_parameters()})
    tracked = int(model.bn1.num_batches_tracked)
    steps(live, sgd(live), 2)
    after = {**model.state_dict(), **live.own_parameters()}
    assert [name for name in before if same(before[name], after[name])] == []
    assert model.bn1.num_batches_tracked == tracked + 4  # both branches
    assert live.deployed() is model
    assert model.state_dict().keys() == build("normed").state_dict().keys()


def test_a_resumed_run_continues_bit_identically():
    model = build("normed")
    live = bound(model)
    optimizer = sgd(live)
    steps(live, optimizer, 2)
    file = io.BytesIO()
    torch.save((model.state_dict(), live.state_dict(), optimizer.state_dict()), file)
    expected = steps(live, optimizer, 2)
    live.epoch_start(1, [(X, Y)])

    file.seek(0)
    weights, state, momentum = torch.load(file, weights_only=True)
    fresh = build("normed", seed=1)
    fresh.load_state_dict(weights)
    again = AutoLoRA().bind(fresh, attack=PGD2, seed=7)
    again.seed = 0
    optimizer = sgd(again)
    optimizer.load_state_dict(momentum)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(steps(again, optimizer, 2), expected, strict=True))
    again.epoch_start(1, [(X, Y)])
    assert again.facts() == live.facts()
    assert all(same(p, q) for p, q in zip(again.parameters(), live.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"base": "inner", "lam": 0.0}], ids=["eq-6", "inner"])
def test_clat_on_top_trains_its_layers_alone(settings):
    model = build("normed")
    live = stack(AutoLoRA(), CLAT(select="fixed", layers=("conv2",), **settings)).bind(model, attack=PGD2)
    live.epoch_start(0, [(X, Y)])
    before = copy.deepcopy({**model.state_dict(), **live.own_parameters()})
    steps(live, sgd(live), 2)
    after = {**model.state_dict(), **live.own_parameters()}
    assert {name for name in before if not same(before[name], after[name])} == {"conv2.weight", "conv2.bias"}


def test_it_is_named_as_in_the_papers_tables():
    assert stack(AutoLoRA(), CLAT(k=1)).label == "AutoLoRA + CLAT"
    assert METHODS["autolora"] is AutoLoRA


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "autolora rank is 0; it must be at least 1"),
        ({"probe_size": 0}, "autolora probe_size is 0; it must be at least 1"),
        ({"alpha": 0.0}, "autolora alpha is 0.0; it must be a finite number > 0"),
        ({"kl_scale": -1.0}, "autolora kl_scale is -1.0; it must be a finite number >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AutoLoRA(**settings)


def test_a_loss_before_the_first_epoch_or_without_a_model_is_refused():
    with pytest.raises(InputError, match=r"autolora has no weights yet: call epoch_start\(epoch, probe\)"):
        AutoLoRA().bind(build("normed"), attack=PGD2)(X, Y)
    plain = PGDAT().bind(build("normed"), attack=PGD2)
    with pytest.raises(InputError, match="autolora has no loss without its adapters"):
        AutoLoRA().loss(plain.view, perturbed(plain, X))


@pytest.mark.parametrize("probe", [[], [(X, torch.full_like(Y, -1))]], ids=["empty", "unlabelled"])
def test_a_probe_without_labels_is_refused(probe):
    with pytest.raises(InputError, match="the probe is empty: pass some labelled training images"):
        AutoLoRA().bind(build("normed"), attack=PGD2).epoch_start(0, probe)


def test_networks_that_it_does_not_fit_are_refused_before_training():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match="autolora adapts convolutions, and Sequential has none before its classifier"):
        AutoLoRA().bind(flat, attack=PGD2).check(X[:1])
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 6), nn.Flatten(), nn.GLU())
    with pytest.raises(InputError, match="none of the layers of Sequential returns its logits"):
        AutoLoRA().bind(headless, attack=PGD2).check(X[:1])
    AutoLoRA().bind(nn.Sequential(nn.Conv2d(3, 6, 3), Head(6)), attack=PGD2).check(X[:1])
