"""CLAT's loss against Eq. 5 and 6 by hand, and its reductions to other methods."""

import pytest
import torch
import torch.nn.functional as F

from as_found import left_as_found, same
from toughen.attacks import PGD, CrossEntropy, FeatureShift, fgsm_rs
from toughen.engine.flops import flops_per_image
from toughen.layers import ModelView
from toughen.methods import CLAT, stack
from toughen.objectives import PGDAT, CleanCE
from toughen.rng import generator
from toughen.types import Batch, ThreatModel
from zoo import build, images

X, Y = images(8)
PROBE = [(X, Y)]
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
EVERY_LAYER = ("first", "second", "third", "head.fc")


def bound(model, layers=("second",), attack=PGD2, inner=None, **settings):
    """CLAT with these layers selected."""
    method = CLAT(select="fixed", layers=layers, **settings)
    live = (stack(inner, method) if inner else method).bind(model, attack=attack)
    live.epoch_start(0, PROBE)
    return live


def perturbed(model, layers, attack=PGD2, call=0, **goal):
    """The perturbation of Eq. 5 that a live method with seed 0 finds in its n-th call."""
    return attack(model, X, Y, goal=FeatureShift(layers=layers, **goal), generator=generator(0, "attack", call))


def distance(model, x_adv, layers):
    clean, moved = (ModelView(model).features(x, layers).values for x in (X, x_adv))
    return sum((moved[name] - clean[name]).flatten(1).norm(dim=1).mean() for name in layers)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layers", [("second",), ("third", "first")])
def test_the_loss_is_eq_6(layers):
    model = build("backwards")
    out = bound(model, layers, lam=0.7)(X, Y)
    x_adv = perturbed(model, layers)
    torch.testing.assert_close(out.terms["clean_ce"], F.cross_entropy(model(X), Y))
    torch.testing.assert_close(out.terms["feature"], distance(model, x_adv, layers))
    torch.testing.assert_close(out.loss, F.cross_entropy(model(X), Y) + 0.7 * distance(model, x_adv, layers))


def test_its_gradient_is_that_of_eq_6():
    model, reference = build("backwards"), build("backwards")
    bound(model, ("second", "third"), lam=0.7)(X, Y).loss.backward()
    x_adv = perturbed(reference, ("second", "third"))
    (F.cross_entropy(reference(X), Y) + 0.7 * distance(reference, x_adv, ("second", "third"))).backward()
    for name in ("second.weight", "second.bias", "third.weight", "third.bias"):
        torch.testing.assert_close(gradients(model)[name], gradients(reference)[name], rtol=1e-3, atol=1e-6)
    assert gradients(model)["first.weight"] is None


def test_the_adversarial_base_is_the_cross_entropy_at_the_perturbation_of_eq_5():
    model = build("backwards")
    out = bound(model, base="adv_ce", lam=0.7)(X, Y)
    x_adv = perturbed(model, ("second",))
    torch.testing.assert_close(out.terms["adv_ce"], F.cross_entropy(model(x_adv), Y))
    torch.testing.assert_close(out.loss, F.cross_entropy(model(x_adv), Y) + 0.7 * distance(model, x_adv, ("second",)))


@pytest.mark.parametrize("inner", [PGDAT(), CleanCE()], ids=["pgd-at", "clean"])
def test_the_inner_base_is_the_inner_methods_loss_plus_lam_times_l_c(inner):
    model = build("backwards")
    live = bound(model, base="inner", lam=0.7, inner=inner)
    draw = torch.Generator().manual_seed(1)
    adv = live.perturb(Batch(X, Y), generator=draw)
    out = live.loss(adv)
    expected = inner.bind(model, attack=PGD2).loss(adv.inner).loss
    torch.testing.assert_close(out.loss, expected + 0.7 * distance(model, adv.x_adv, ("second",)))
    alone = inner.bind(model, attack=PGD2).perturb(Batch(X, Y), generator=torch.Generator().manual_seed(1))
    assert torch.equal(adv.inner.x_adv, alone.x_adv)
    assert not torch.equal(adv.inner.x_adv, adv.x_adv)


def test_the_inner_base_with_lam_zero_is_the_inner_method_on_the_selected_layers():
    model, reference = build("backwards"), build("backwards")
    out = bound(model, base="inner", lam=0.0, inner=PGDAT())(X, Y)
    expected = PGDAT().bind(reference, attack=PGD2)(X, Y)
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    assert same(gradients(model)["second.weight"], gradients(reference)["second.weight"])


def run(model, make_loss, count=3):
    """Steps of an ordinary loop over the parameters that ask for gradients; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    losses = []
    for call in range(count):
        optimizer.zero_grad()
        loss = make_loss(call)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same_weights(a, b):
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_with_lam_zero_it_is_clean_fine_tuning_of_the_selected_layers():
    model, reference = build("backwards"), build("backwards")
    live = bound(model, lam=0.0)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith("second"))
    found = run(model, lambda _: live(X, Y).loss)
    expected = run(reference, lambda _: F.cross_entropy(reference(X), Y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same_weights(model, reference)


def test_with_all_layers_and_an_adversarial_base_it_is_pgd_at_with_the_perturbation_of_eq_5():
    model, reference = build("backwards"), build("backwards")
    live = bound(model, EVERY_LAYER, base="adv_ce", lam=0.0)

    def adversarial(call):
        x_adv = perturbed(reference, EVERY_LAYER, call=call)
        return F.cross_entropy(reference(x_adv), Y)

    found, expected = run(model, lambda _: live(X, Y).loss), run(reference, adversarial)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same_weights(model, reference)


def test_with_the_classifier_alone_it_is_logit_pairing():
    model = build("nested").eval()
    out = bound(model, ("head.fc",), lam=0.5, norm_stats="update")(X, Y)
    x_adv = perturbed(model, ("head.fc",))
    pairing = (model(x_adv) - model(X)).norm(dim=1).mean()
    torch.testing.assert_close(out.loss, F.cross_entropy(model(X), Y) + 0.5 * pairing)


def test_the_fast_mode_is_one_fgsm_rs_step_on_eq_5():
    model = build("backwards")
    live = bound(model, ("first", "third"), inner_max="fgsm-rs", lam=0.7)
    adv = live.perturb(Batch(X, Y), generator=generator(0, "attack", 0))
    assert torch.equal(adv.x_adv, perturbed(model, ("first", "third"), attack=fgsm_rs(PGD2.threat)))
    assert not torch.equal(adv.x_adv, perturbed(model, ("first", "third")))


@pytest.mark.parametrize("layers", [("first",), ("third", "first")])
def test_truncated_and_full_forwards_train_bit_the_same(layers):
    found = []
    for forward in ("truncated", "full"):
        model = build("backwards")
        live = bound(model, layers, forward=forward)
        found.append([*run(model, lambda _, live=live: live(X, Y).loss), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_features_norm_enters_attack_and_loss():
    model = build("backwards")
    out = bound(model, ("second", "third"), feature_norm="squared", lam=1.0)(X, Y)
    x_adv = perturbed(model, ("second", "third"), norm="squared")
    clean, moved = (ModelView(model).features(x, ("second", "third")).values for x in (X, x_adv))
    expected = sum((moved[n] - clean[n]).square().flatten(1).sum(dim=1).mean() for n in clean)
    torch.testing.assert_close(out.terms["feature"], expected)


def test_auto_lam_balances_the_two_terms_at_the_first_selection():
    model = build("normed")
    live = bound(model, ("conv2",), lam="auto", rho=0.3, every=1)
    frozen = build("normed").eval()
    x_adv = PGD2(frozen, X, Y, goal=FeatureShift(layers=("conv2",)), generator=generator(0, "lam"))
    with torch.no_grad():
        expected = 0.3 * F.cross_entropy(frozen(X), Y) / distance(frozen, x_adv, ("conv2",))
    assert live.lam == pytest.approx(float(expected), rel=1e-5)
    before = live.lam
    with torch.no_grad():
        model.conv2.weight.mul_(3)
    live.epoch_start(1, PROBE)
    assert live.lam == before


def test_layer_gradients_are_cut_when_each_layer_trains_on_its_own_term():
    def gradient_of_first(**settings):
        model = build("backwards")
        live = bound(model, lam=50.0, **settings)
        live(X, Y).loss.backward()
        return model.first.weight.grad

    flow = gradient_of_first(layers=("first", "third"))
    own = gradient_of_first(layers=("first", "third"), layer_grad="own")
    assert (own - flow).norm() > 0.1 * flow.norm()
    model = build("backwards")
    adv = bound(model, ("first", "third")).perturb(Batch(X, Y), generator=generator(0, "attack", 0))
    (F.cross_entropy(model(X), Y) + 50.0 * distance(model, adv.x_adv, ("first",))).backward()
    torch.testing.assert_close(own, model.first.weight.grad, rtol=1e-3, atol=1e-4)


def test_detached_clean_features_change_the_gradient_and_not_the_loss():
    found = []
    for clean_grad in ("keep", "detach"):
        model = build("backwards")
        out = bound(model, lam=50.0, clean_grad=clean_grad)(X, Y)
        out.loss.backward()
        found.append((out.loss.detach(), model.second.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() > 0.1 * found[0][1].norm()


def when_halved(norm_stats):
    """What halving a critical convolution in front of a batch norm does to L_C (factor) and the logits (change)."""
    model = build("normed")
    with torch.no_grad():
        model.head.fc.weight.mul_(100)
    live = bound(model, ("conv1",), lam=1.0, norm_stats=norm_stats)
    model.train()
    adv = live.perturb(Batch(X, Y), generator=generator(0, "attack", 0)).elsewhere()
    before, logits = live.loss(adv).terms["feature"], model(X)
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)
    after, logits_after = live.loss(adv).terms["feature"], model(X)
    return float(after / before), float((logits_after - logits).detach().abs().max())


def test_halving_a_convolution_halves_l_c_and_is_free_with_batch_statistics_only():
    (factor, change), (factor_frozen, change_frozen) = when_halved("update"), when_halved("frozen")
    assert factor == pytest.approx(0.5, rel=1e-4)
    assert factor_frozen == pytest.approx(0.5, rel=1e-4)
    assert change < 0.1 * change_frozen  # not 0, because of the epsilon in batch norm


def test_until_start_epoch_the_inner_method_trains_alone_bit_for_bit():
    model, reference = build("normed"), build("normed")
    live = stack(PGDAT(), CLAT(start_epoch=2)).bind(model, attack=PGD2, seed=3)
    alone = PGDAT().bind(reference, attack=PGD2, seed=3)
    for epoch in range(2):
        assert live.epoch_start(epoch) is None
    found, expected = run(model, lambda _: live(X, Y).loss), run(reference, lambda _: alone(X, Y).loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same_weights(model, reference)


@pytest.mark.parametrize("settings", [{}, {"base": "adv_ce"}, {"base": "inner"}, {"inner_max": "fgsm-rs"}], ids=str)
def test_perturbing_leaves_the_model_as_found(settings):
    model = build("normed")
    live = bound(model, ("conv2",), inner=PGDAT(), **settings)
    with left_as_found(model):
        live.perturb(Batch(X, Y), generator=torch.Generator())


def test_a_frozen_batch_norm_is_frozen_for_an_attack_in_the_models_own_mode_too():
    model = build("normed")
    live = bound(model, ("conv2",), attack=PGD(PGD2.threat, step_size=0.05, steps=2, model_mode="unchanged"))
    model.train()  # as loops do at the start of an epoch
    seen = []
    model.bn1.register_forward_hook(lambda module, *_: seen.append(module.training))
    live.perturb(Batch(X, Y), generator=torch.Generator())
    assert not any(seen)


def test_a_frozen_batch_norm_stays_frozen_when_the_loop_goes_into_train_mode_between_attack_and_loss():
    model = build("normed")
    live = bound(model, ("conv2",))
    adv = live.perturb(Batch(X, Y), generator=torch.Generator())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    live.loss(adv)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_cross_entropy_attack_is_left_to_the_selection():
    calls = []

    class Spy:
        threat = PGD2.threat

        def __call__(self, *args, goal=None, **kwargs):
            calls.append(goal)
            return PGD2(*args, goal=goal, **kwargs)

    live = bound(build("backwards"), attack=Spy(), lam=0.5)
    live(X, Y)
    assert [goal is None or isinstance(goal, CrossEntropy) for goal in calls] == [True, False]
    assert calls[1].layers == ("second",)


def test_more_weight_on_l_c_makes_the_selected_layer_less_critical():
    weakness = []
    for lam in (0.0, 5.0):
        model = build("normed")
        live = bound(model, ("conv2",), lam=lam, every=1)
        run(model, lambda _, live=live: live(X, Y).loss, count=8)
        report = live.epoch_start(1, PROBE).report
        weakness.append({row.name: row.weakness for row in report.rows}["conv2"])
    assert weakness[1] < 0.8 * weakness[0]


@pytest.mark.parametrize("norm_stats", ["frozen", "follow", "update"])
def test_truncation_changes_no_weight_and_no_buffer_whatever_batch_norm_does(norm_stats):
    states = []
    for forward in ("truncated", "full"):
        model = build("normed")
        live = bound(model, ("conv1",), lam=0.1, norm_stats=norm_stats, forward=forward)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            live(X, Y).loss.backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("base", ["clean_ce", "adv_ce", "inner"])
@pytest.mark.parametrize(("name", "shared"), [("normed", True), ("backwards", True), ("dropouts", False)])
def test_attack_and_loss_share_one_clean_forward_where_it_is_the_same_in_both(base, name, shared):
    model = build(name)
    layer = {"normed": "conv1", "backwards": "second", "dropouts": "mix"}[name]
    live = bound(model, (layer,), lam=0.7, base=base, inner=PGDAT() if base == "inner" else None)
    model.train()
    adv = live.perturb(Batch(X, Y), generator=generator(0, "attack", 0))
    assert (adv.clean is not None) == shared
    if shared:
        assert torch.equal(adv.x_adv, perturbed(model, (layer,))) or base == "inner"
        torch.testing.assert_close(live.loss(adv).loss, live.loss(adv.elsewhere()).loss)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])  # before any batch norm, and behind one
@pytest.mark.parametrize("norm_stats", ["follow", "update"])
def test_moving_statistics_leave_each_its_own_clean_forward(norm_stats, layer):
    live = bound(build("normed"), (layer,), lam=0.7, norm_stats=norm_stats)
    assert live.perturb(Batch(X, Y), generator=generator(0, "attack", 0)).clean is None


def test_images_perturbed_without_gradients_give_the_same_loss_and_gradients():
    found = []
    for without in (True, False):
        model = build("normed")
        live = bound(model, ("conv2",), lam=0.7)
        with torch.set_grad_enabled(not without):
            adv = live.perturb(Batch(X, Y), generator=generator(0, "attack", 0))
        live.loss(adv).loss.backward()
        found.append(gradients(model))
    assert all(same(found[0][name], found[1][name]) for name in found[0])


def test_images_perturbed_in_eval_mode_leave_the_loss_its_own_clean_forward():
    model = build("dropouts")
    live = bound(model, ("conv",), lam=0.7)
    model.train()
    assert live.perturb(Batch(X, Y), generator=generator(0, "attack", 0)).clean is not None
    model.eval()
    assert live.perturb(Batch(X, Y), generator=generator(0, "attack", 0)).clean is None


@pytest.mark.parametrize(("clean_forward", "shared"), [("shared", True), ("repeated", False)])
def test_whether_the_clean_forward_is_shared_survives_resuming_and_follows_the_settings(clean_forward, shared):
    state = bound(build("normed"), ("conv2",), lam=0.7).state_dict()
    settings = CLAT(select="fixed", layers=("conv2",), lam=0.7, clean_forward=clean_forward)
    resumed = settings.bind(build("normed"), attack=PGD2)
    resumed.load_state_dict(state)
    adv = resumed.perturb(Batch(X, Y), generator=generator(0, "attack", 0))
    assert (adv.clean is not None) == shared


def test_repeating_the_clean_forward_changes_nothing_but_the_work():
    found = []
    for clean_forward in ("shared", "repeated"):
        model = build("normed")
        live = bound(model, ("conv2",), lam=0.7, clean_forward=clean_forward)
        model.train()
        operations = flops_per_image(live, Batch(X, Y))
        live(X, Y).loss.backward()
        found.append((operations, gradients(model)))
    (shared, with_shared), (repeated, with_repeated) = found
    assert all(same(with_shared[name], with_repeated[name]) for name in with_shared)
    assert shared < repeated
