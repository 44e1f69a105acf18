"""Training the mixing network of two frozen networks: its loss, what it leaves alone, what it learns."""

import io
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from as_found import left_as_found
from toughen.attacks import PGD
from toughen.errors import InputError
from toughen.methods import CLAT, EMA, stack
from toughen.models import create
from toughen.models.adaptive_smoothing import MixtureOptions, mix
from toughen.objectives import AdaptiveSmoothing
from toughen.rng import generator
from toughen.types import AdversarialBatch, Batch, ThreatModel

SHAPE = (1, 8, 8)
PGD2 = PGD(ThreatModel(eps=0.2), step_size=0.1, steps=2)
DRAW = torch.Generator().manual_seed(0)
X, Y = torch.rand(6, *SHAPE, generator=DRAW), torch.tensor([0, 1, 2, 3, 4, 5])
X_ADV = (X + 0.2 * torch.randn(X.shape, generator=DRAW)).clamp(0, 1)


def mixture(**options):
    g, h = (create("small_cnn", width=2, in_channels=1, seed=seed) for seed in (1, 2))
    return mix(g, h, alpha="learned", image_shape=SHAPE, options=MixtureOptions(**options)).train()


def train(live, batches, *, lr=0.01):
    optimizer = torch.optim.Adam(live.parameters(), lr=lr)
    losses = []
    for x, y in batches:
        output = live(x, y)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.detach())
    return torch.stack(losses)


# -- the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [None, X_ADV.flip(0)])
def test_loss_and_gradient_are_those_of_the_formula(second):
    model = mixture().double()
    twin = deepcopy(model)
    objective = AdaptiveSmoothing(detect_weight=1.5, ce_weight=0.2, product_weight=0.3)
    live = objective.bind(model, attack=PGD2)
    second = None if second is None else second.double()
    out = live.loss(AdversarialBatch(Batch(X.double(), Y), X_ADV.double(), second=second))
    out.loss.backward()

    images = torch.cat([X, X_ADV, *([] if second is None else [second])]).double()
    y = Y.repeat(len(images) // 6)
    gamma = twin.mixed(images).gamma
    a = 1 / (1 + torch.exp(-gamma))[:, None]
    p = (1 - a) * torch.softmax(twin.accurate(images), 1) + a * torch.softmax(twin.robust(images), 1)
    ce = -torch.log(p[range(len(y)), y])
    a = a.squeeze(1)
    attacked = torch.tensor([0.0] * 6 + [1.0] * (len(y) - 6), dtype=torch.float64)
    bce = -(attacked * torch.log(a) + (1 - attacked) * torch.log(1 - a))
    expected = (1.5 * bce + 0.2 * ce + 0.3 * bce * ce).mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    assert out.terms == {"detect_bce": pytest.approx(bce.mean().item()), "mixture_ce": pytest.approx(ce.mean().item())}
    for name, parameter in twin.mixing.named_parameters():
        torch.testing.assert_close(model.mixing.get_parameter(name).grad, parameter.grad, msg=name)


def test_images_without_a_label_add_nothing_of_their_own():
    model = mixture()
    labels = Y.clone()
    labels[[1, 4]] = -1
    live = AdaptiveSmoothing(ce_weight=1.0).bind(model.eval(), attack=PGD2)  # in eval mode images don't mix
    known = labels >= 0
    found = live.loss(AdversarialBatch(Batch(X, labels), X_ADV))
    expected = live.loss(AdversarialBatch(Batch(X[known], Y[known]), X_ADV[known]))
    assert torch.allclose(found.loss, expected.loss)
    nothing = live.loss(AdversarialBatch(Batch(X, torch.full_like(Y, -1)), X_ADV)).loss
    assert nothing.item() == 0.0


# -- the attack ---------------------------------------------------------------------------------------


def test_the_attack_is_on_the_mixture_as_it_trains_or_on_the_robust_network_or_on_both():
    model = mixture()

    def found(attacked):
        objective = AdaptiveSmoothing(attacked=attacked)
        return objective.perturb(model, Batch(X, Y), PGD2, generator=torch.Generator().manual_seed(7))

    draw = torch.Generator().manual_seed(7)
    whole_range = mixture(alpha_range=(0.0, 1.0), gamma_shift=0.4)  # in eval mode what the other is in training
    on_mixture = PGD2(whole_range, X, Y, generator=draw)
    then_on_robust = PGD2(model.robust, X, Y, generator=draw)
    on_robust = PGD2(model.robust, X, Y, generator=torch.Generator().manual_seed(7))
    assert torch.equal(found("mixture").x_adv, on_mixture)
    assert torch.equal(found("robust").x_adv, on_robust)
    assert torch.equal(found("both").x_adv, on_mixture)
    assert torch.equal(found("both").second, then_on_robust)
    assert found("mixture").second is found("robust").second is None
    assert not torch.equal(on_mixture, on_robust)
    assert not torch.equal(on_mixture, PGD2(model, X, Y, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("attacked", ["mixture", "both"])
def test_perturbing_leaves_the_mixture_as_found_and_begins_where_it_is_told(attacked):
    model = mixture()
    live = AdaptiveSmoothing(attacked=attacked).bind(model, attack=PGD(ThreatModel(eps=0.2), step_size=0.0, steps=1))
    start = (X + 0.1).clamp(0, 1)
    with left_as_found(model):
        adv = live.perturb(Batch(X, Y, start=start), generator=torch.Generator())
    assert torch.allclose(adv.x_adv, start)
    assert not adv.x_adv.requires_grad


# -- what trains --------------------------------------------------------------------------------------


def test_training_moves_the_mixing_network_and_not_one_bit_of_both_networks():
    model = mixture()
    model.robust.linear.bias.requires_grad_(False)
    before = deepcopy(model.state_dict())
    live = AdaptiveSmoothing().bind(model, attack=PGD2)
    assert {id(p) for p in live.trainable()} == {id(p) for p in model.mixing.parameters()}
    train(live, [(X, Y)] * 2)
    after = model.state_dict()
    bases = [name for name in after if not name.startswith("mixing.")]
    assert all(torch.equal(before[name], after[name]) for name in bases)
    assert len(bases) > 0
    assert all(not torch.equal(before[n], after[n]) for n in ("mixing.linear.weight", "mixing.norm.running_mean"))
    assert all(p.grad is None for base in (model.accurate, model.robust) for p in base.parameters())
    live.release()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["robust.linear.bias"]


def test_the_mixing_network_learns_to_tell_attacked_images():
    draw = torch.Generator().manual_seed(3)
    model = mixture()
    y = torch.arange(20) % 10

    def batch():
        coarse = torch.rand(20, 1, 2, 2, generator=draw)
        return F.interpolate(coarse, size=(8, 8), mode="bilinear"), y

    def rightly_ordered():
        """The share of pairs in which the attacked image has the larger gamma."""
        x, y = batch()
        x_adv = PGD2(model, x, y, generator=draw)
        model.eval()
        with torch.no_grad():
            clean, attacked = (model.mixed(images).gamma for images in (x, x_adv))
        return (attacked[:, None] > clean).float().mean()

    assert rightly_ordered() < 0.8
    live = AdaptiveSmoothing().bind(model.train(), attack=PGD2)
    losses = train(live, [batch() for _ in range(25)])
    assert losses[-5:].mean() < 0.5 * losses[:2].mean()
    assert rightly_ordered() > 0.9


def test_saved_state_continues_bit_identically():
    def bound():
        model = mixture()
        return model, AdaptiveSmoothing().bind(model, attack=PGD2, seed=4)

    model, live = bound()
    train(live, [(X, Y)] * 2)
    file = io.BytesIO()
    torch.save({"live": live.state_dict(), "weights": model.state_dict()}, file)
    expected = live(X, Y).loss

    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, resumed = bound()
    fresh.load_state_dict(state["weights"])
    resumed.load_state_dict(state["live"])
    assert torch.equal(resumed(X, Y).loss, expected)
    assert torch.equal(generator(4, "attack", 3).get_state(), generator(4, "attack", resumed.calls).get_state())


# -- what is refused ----------------------------------------------------------------------------------


def test_another_model_and_a_constant_weight_are_refused():
    small = create("small_cnn", width=2, in_channels=1, seed=0)
    with pytest.raises(InputError, match="trains a mixture of two networks, and the model is SmallCNN; set model="):
        AdaptiveSmoothing().bind(small, attack=PGD2)
    with pytest.raises(InputError, match=r"nothing to train in a mixture of constant alpha=0\.3"):
        AdaptiveSmoothing().bind(mix(small, small, alpha=0.3), attack=PGD2)


def test_clat_on_top_is_refused_with_what_to_do_instead():
    message = r"^Adaptive smoothing does not go with CLAT: .*train the robust network with PGD-AT \+ CLAT and mix"
    with pytest.raises(InputError, match=message):
        stack(AdaptiveSmoothing(), CLAT(k=1))
    assert stack(AdaptiveSmoothing()).label == "Adaptive smoothing"


def test_an_average_copies_batch_norm_statistics_and_does_not_measure_those_of_frozen_networks_anew():
    with pytest.raises(
        InputError, match=r"^EMA with norm_stats='reestimate' would measure.*set its norm_stats='copy'$"
    ):
        stack(AdaptiveSmoothing(), EMA(norm_stats="reestimate"))
    model = mixture()
    before = deepcopy(model.state_dict())
    live = stack(AdaptiveSmoothing(), EMA(decay=0.5)).bind(model, attack=PGD2)
    for _ in range(2):
        train(live, [(X, Y)])
        live.step_end()
    live.epoch_end([(X, Y)])
    kept = live.deployed().state_dict()
    assert all(torch.equal(before[name], kept[name]) for name in kept if not name.startswith("mixing."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attacked": "accurate"}, r"unknown adaptive-smoothing attacked 'accurate'.*Allowed: both, mixture, robust"),
        ({"detect_weight": -1.0}, r"detect_weight is -1\.0; it must be a finite number >= 0"),
        ({"product_weight": float("inf")}, "product_weight is inf"),
        ({"detect_weight": 0.0, "product_weight": 0.0}, "are all 0; nothing would be learned"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AdaptiveSmoothing(**settings)
